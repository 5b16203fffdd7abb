"""Conversations in which the user tells something and asks for it later.

The kinds of facts are in `memory.yaml`. Between telling and asking may stand other questions, never
held-out ones of their tasks. The key is the fact, its value and the question.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import yaml

from rayseek.serve_app.prompt import Message
from rayseek.serve_app.tasks import arithmetic, facts
from rayseek.serve_app.tasks import chat as small_talk
from rayseek.serve_app.tasks.asking import general_system
from rayseek.serve_app.tasks.example import Answer, Chat, Judge, Language, Task, draw
from rayseek.serve_app.tasks.tool_values import KINDS
from rayseek.serve_app.tasks.wording import drawn, filled, plain, spoken
from rayseek.serve_app.tasks.words import ANIMALS, COLOURS, FOODS

_NEVER_TOLD = 0.08  # of the questions are for something that was not told


@dataclass(frozen=True, slots=True)
class Fact:
    """Something to tell, with {0} as its value, and how it is asked for and answered."""

    telling: str
    kind: str
    questions: tuple[str, ...]
    answer: str


def _facts(entry: Mapping[str, Any]) -> tuple[Fact, ...]:
    parts = (line.split(" = ") for line in entry["facts"])
    return tuple(
        Fact(told, kind, tuple(asked.split("; ")), said) for told, kind, asked, said in parts
    )


_TEXTS: Mapping[Language, Mapping[str, Any]] = yaml.safe_load(
    Path(__file__).with_suffix(".yaml").read_text("utf-8")
)
_FACTS: Mapping[Language, tuple[Fact, ...]] = {n: _facts(entry) for n, entry in _TEXTS.items()}
_LISTS = {"animal": ANIMALS, "colour": COLOURS, "food": FOODS}


def _value(random: Random, language: Language, kind: str) -> str:
    if kind == "age":
        return str(random.randint(5, 99))
    if kind in _LISTS:
        return random.choice(_LISTS[kind][language])
    return KINDS[kind](random, language)[0].removesuffix(".5")


def says(value: str) -> Judge:
    """The value stands in the answer."""
    return lambda answer: not answer.calls and value.lower() in answer.text.lower()


def _not_told(answer: Answer) -> bool:
    text = answer.text.lower()
    signs = ("not", "n't", "no ", "sorry", "没", "不", "抱歉")
    return not answer.calls and any(sign in text for sign in signs)


def _between(random: Random, language: Language) -> tuple[Message, ...]:
    """A question about something else, and its answer."""
    source = random.choice((*small_talk.TASKS, *small_talk.TASKS, *facts.TASKS, *arithmetic.TASKS))
    other = draw(source, "train", random, language)
    assert isinstance(other, Chat)
    return (*(m for m in other.messages if m.role != "system"), other.answer)


def make(random: Random, language: Language) -> Chat:
    """One or two tellings, perhaps other talk, then a question."""
    texts = _TEXTS[language]
    chosen = random.sample(_FACTS[language], random.choice((1, 1, 2, 2, 3)))
    values = [_value(random, language, fact.kind) for fact in chosen]
    told = [drawn(random, fact.telling) for fact in chosen]
    at = random.randrange(len(chosen))
    fact, value = chosen[at], values[at]
    unknown = len(chosen) > 1 and random.random() < _NEVER_TOLD
    if unknown:  # what was to be asked for is left out
        for remaining in (chosen, values, told):
            del remaining[at]
    introduction = _FACTS[language][0]
    system = general_system(random, language)
    messages = [] if system is None else [Message("system", system)]
    if random.random() < 0.5:  # all in one sentence
        numbered = (text.replace("{0}", f"{{{i}}}") for i, text in enumerate(told))
        tellings = [(texts["join"].join(numbered), values, chosen == [introduction])]
    else:
        each = zip(told, values, chosen, strict=True)
        tellings = [(text, [said], fact is introduction) for text, said, fact in each]
    for text, said, introduced in tellings:
        messages += [
            Message("user", filled(spoken(random, language, text, ".", polite=0), *said)),
            Message("assistant", filled(texts["nice"], *said) if introduced else texts["ack"]),
        ]
    for _ in range(random.choice((0, 0, 1, 1, 2))):
        messages += _between(random, language)
    question = drawn(random, random.choice(fact.questions))
    messages.append(Message("user", spoken(random, language, question)))
    return Chat(
        f"{fact.answer}|{'' if unknown else value}|{plain(question)}",
        tuple(messages),
        Message("assistant", texts["unknown"] if unknown else filled(fact.answer, value)),
        _not_told if unknown else says(value),
        language=language,
    )


TASKS = (Task("memory", make, weight=4),)
