"""What a task is: a seeded source of questions, each with its right answer and a judge.

The same tasks make the small model's training text and the questions of `rayseek eval`. A question
is held out or not by the hash of its key, so no held-out question can be drawn for training,
whatever the seed. Pure Python: no model, no network.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from rayseek.serve_app.prompt import Message

Language = Literal["en", "zh"]
Split = Literal["train", "held-out"]
HELD_OUT = 10  # one question of so many


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call as an answer has it; arguments are parsed JSON."""

    name: str
    arguments: Any


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back from an endpoint: text (of a chat or a completion) and tool calls."""

    text: str
    calls: tuple[Call, ...] = ()
    finish_reason: str = "stop"


Judge = Callable[[Answer], bool]


@dataclass(frozen=True, slots=True)
class Chat:
    """A question as the chat API takes it, and a model answer.

    key: identifies the question, not its wording around it: "37+45", "capital of France|phrase 3".
    messages: up to and including the question (the last is of role user or tool).
    answer: the assistant message to learn. earlier assistant messages are learnt too.
    judge: whether another answer is right as well.
    """

    key: str
    messages: tuple[Message, ...]
    answer: Message
    judge: Judge
    tools: tuple[Mapping[str, Any], ...] = ()
    json_mode: bool = False
    language: Language = "en"


@dataclass(frozen=True, slots=True)
class Fill:
    """A hole in a text, as the FIM API takes it."""

    key: str
    prefix: str
    suffix: str
    middle: str
    judge: Judge
    language: Language = "en"


Example = Chat | Fill
Maker = Callable[[Random, Language], Example]


@dataclass(frozen=True, slots=True)
class Task:
    """weight: share of the training text, relative to the other tasks."""

    name: str
    make: Maker
    weight: float
    languages: tuple[Language, ...] = ("en", "zh")


def is_held_out(task: str, key: str) -> bool:
    """Decided by task and key alone."""
    digest = hashlib.blake2b(f"{task}|{key}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % HELD_OUT == 0


def draw(task: Task, split: Split, random: Random, language: Language) -> Example:
    """A question of this split. Raises RuntimeError if the task hardly has any."""
    for _ in range(1000):
        example = task.make(random, language)
        if is_held_out(task.name, example.key) == (split == "held-out"):
            return example
    raise RuntimeError(f"task {task.name} has no {split} questions in {language}")


def questions(task: Task, language: Language, count: int, seed: int = 0) -> Iterator[Example]:
    """`count` different held-out questions (by key and wording), the same for the same seed."""
    random = Random(f"{seed}|{task.name}|{language}")
    seen: set[Any] = set()
    for _ in range(100 * count):
        if len(seen) == count:
            return
        example = draw(task, "held-out", random, language)
        shown = example.messages if isinstance(example, Chat) else (example.prefix, example.suffix)
        if shown not in seen:
            seen.add(shown)
            yield example
