"""Conversations of two or three questions; only the last is judged.

The questions are other tasks', unrelated or, for facts, one that only names what it asks about
("and Spain?"). A dialogue is held out exactly when its last question is held out in its own task;
the earlier ones never are.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

from rayseek.serve_app.prompt import Message
from rayseek.serve_app.tasks import (
    arithmetic,
    chat,
    code,
    counting,
    dates,
    decline,
    edits,
    facts,
    json_answers,
    lists,
    sorting,
    units,
)
from rayseek.serve_app.tasks.example import Chat, Language, Task, draw, is_held_out

NAME = "dialogue"
_SOURCES: tuple[Task, ...] = (
    *(*chat.TASKS, *chat.TASKS, *chat.TASKS, *facts.TASKS, *facts.TASKS, *decline.TASKS),
    *(*arithmetic.TASKS, *arithmetic.TASKS, *sorting.TASKS, *counting.TASKS, *lists.TASKS),
    *(*dates.TASKS, *units.TASKS, *edits.TASKS, *json_answers.TASKS, *code.TASKS),
)
_LONG = 400  # characters; an earlier question that is longer is passed over


def _plain(asked: Chat) -> bool:
    """Whether a question needs neither its system prompt nor the API's JSON mode."""
    return not asked.json_mode and asked.messages[0].role != "system"


def _last(random: Random, language: Language) -> tuple[str, Chat]:
    """The question that counts, and its key in this task.

    Keys of both tasks must agree on what is held out, so one in five is drawn again.
    """
    while True:
        source = random.choice(_SOURCES)
        asked = source.make(random, language)
        if not isinstance(asked, Chat) or not _plain(asked):
            continue
        key = f"{source.name}|{asked.key}"
        if is_held_out(NAME, key) == is_held_out(source.name, asked.key):
            return key, asked


def _earlier(random: Random, language: Language) -> tuple[Message, ...]:
    """A question and its answer that may be shown in training."""
    while True:
        asked = draw(random.choice(_SOURCES), "train", random, language)
        if isinstance(asked, Chat) and _plain(asked):
            said = (*asked.messages, asked.answer)
            if sum(len(message.content or "") for message in said) < _LONG:
                return said


def _follow_up(random: Random, language: Language) -> Chat:
    """Two facts, the second asked for by its subject alone."""
    while True:
        first, second = facts.follow_up(random, language)
        if _plain(first) and _plain(second) and not is_held_out("facts", first.key):
            break
    messages = (*first.messages, first.answer, *second.messages)
    return replace(second, key=f"facts|{second.key}", messages=messages)


def make(random: Random, language: Language) -> Chat:
    """Two or three questions in one conversation."""
    if random.random() < 0.15:
        return _follow_up(random, language)
    key, asked = _last(random, language)
    before = [_earlier(random, language) for _ in range(random.choice((1, 1, 2)))]
    messages = (*(message for turn in before for message in turn), *asked.messages)
    return replace(asked, key=key, messages=messages)


TASKS = (Task(NAME, make, weight=8),)
