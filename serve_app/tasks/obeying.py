"""System prompts that change the answer: a name, a way to write, facts to know, a single subject.

The wordings are in `obeying.yaml`. A question of another task asked under such a prompt is never a
held-out one of its own task; held out here is the prompt's content together with the question.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import yaml

from rayseek.serve_app.prompt import Message
from rayseek.serve_app.tasks import arithmetic, facts
from rayseek.serve_app.tasks import chat as small_talk
from rayseek.serve_app.tasks.asking import SYSTEM_PROMPTS, some_day
from rayseek.serve_app.tasks.example import Answer, Chat, Judge, Language, Task, draw
from rayseek.serve_app.tasks.judging import says_yes
from rayseek.serve_app.tasks.tool_values import KINDS
from rayseek.serve_app.tasks.wording import drawn, filled, spoken
from rayseek.serve_app.tasks.words import OBJECTS, capitalised, invented_name, name
from rayseek.serve_app.vendor_prompts import MONTHS, WEEKDAYS, system_prompt

_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_GAP: Mapping[Language, str] = {"en": " ", "zh": ""}


@dataclass(frozen=True, slots=True)
class Told:
    """Something a system prompt may tell, with a value {0} of a kind, and how it is asked for."""

    kind: str
    sentence: str
    question: str


def _loaded() -> Mapping[Language, Mapping[str, Any]]:
    texts = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
    return {
        language: {
            key: tuple(Told(*line.split(" = ")) for line in entry)
            if key == "told"
            else tuple(wording.strip() for wording in entry.split("; "))
            for key, entry in entries.items()
        }
        for language, entries in texts.items()
    }


_WORDINGS = _loaded()


def _worded(random: Random, language: Language, kind: str, *values: str) -> str:
    wording = drawn(random, random.choice(_WORDINGS[language][kind]))
    return filled(wording, *values)


def _contains(value: str) -> Judge:
    return lambda answer: not answer.calls and value.lower() in answer.text.lower()


def _made(language: Language, key: str, system: str, text: str, answer: str, judge: Judge) -> Chat:
    messages = (Message("system", capitalised(system)), Message("user", text))
    return Chat(key, messages, Message("assistant", answer), judge, language=language)


def _under(asked: Chat, key: str, system: str, answer: str, judge: Judge) -> Chat:
    """A question of another task under this system prompt."""
    question = next(message.content for message in asked.messages if message.role == "user")
    return _made(asked.language, f"{key}|{asked.key}", system, question or "", answer, judge)


def _inner(random: Random, language: Language) -> Chat:
    """A question with a short answer, from the training part of another task."""
    source = random.choice((*facts.TASKS, *arithmetic.TASKS, *small_talk.TASKS))
    asked = draw(source, "train", random, language)
    assert isinstance(asked, Chat)
    return asked


def _named(random: Random, language: Language) -> Chat:
    """It says the name that it was given."""
    who = name(random, language)
    question = _worded(random, language, "who")
    answer = {"en": f"I am {who}.", "zh": f"我是{who}。"}[language]
    system = _worded(random, language, "name", who)
    text = spoken(random, language, question)
    return _made(language, f"name|{who}|{question}", system, text, answer, _contains(who))


def _ended(random: Random, language: Language) -> Chat:
    """Every answer begins or ends with a certain word."""
    word = random.choice(OBJECTS[language])
    if random.random() < 0.4:
        word = invented_name(random, language).lower()
    asked, where = _inner(random, language), random.choice(("first", "last", "last"))
    shown, said = (
        capitalised(word) + ("!" if language == "en" else "！"),
        asked.answer.content or "",
    )
    answer = _GAP[language].join((shown, said) if where == "first" else (said, shown))

    def judge(reply: Answer) -> bool:
        text = re.sub(r"^[\W_]+|[\W_]+$", "", reply.text.lower())
        bare = text.removeprefix(word) if where == "first" else text.removesuffix(word)
        return bare != text and asked.judge(replace(reply, text=bare.strip(" .!。！")))

    return _under(asked, f"{where}|{word}", _worded(random, language, where, word), answer, judge)


def _cased(random: Random, language: Language) -> Chat:
    """The answer is in upper or in lower case."""
    asked, case = _inner(random, language), random.choice(("upper", "upper", "lower"))
    write = str.upper if case == "upper" else str.lower

    def judge(reply: Answer) -> bool:
        return reply.text == write(reply.text) and asked.judge(reply)

    system = _worded(random, language, case)
    return _under(asked, case, system, write(asked.answer.content or ""), judge)


def _yes_or_no(random: Random, language: Language) -> Chat:
    """Yes or no, about a fact that is right or not."""
    key, text, right = facts.statement(random, language)

    judge = says_yes(right)
    answer = facts.YES_OR_NO[language][right]
    system = _worded(random, language, "yes_or_no")
    return _made(
        language, f"yes|{key}", system, text, answer, lambda a: len(a.text) < 12 and judge(a)
    )


def _short(random: Random, language: Language) -> Chat:
    """The bare fact, or the bare number."""
    if random.random() < 0.6:
        kind = "one_word"
        asked, answer = facts.short_question(random, language)
    else:
        kind = "number"
        drawn_sum = draw(arithmetic.TASKS[0], "train", random, language)
        assert isinstance(drawn_sum, Chat)
        asked, answer = drawn_sum, (drawn_sum.answer.content or "").rpartition("= ")[2]

    def judge(reply: Answer) -> bool:
        return len(reply.text.split()) <= 3 and len(reply.text) < 30 and asked.judge(reply)

    return _under(asked, "short", _worded(random, language, kind), answer, judge)


def _today(random: Random, language: Language) -> Chat:
    """DeepSeek's own system prompt tells the day."""
    day = some_day(random)
    chinese = f"{day.month}月{day.day}日，星期{WEEKDAYS[day.weekday()]}"
    english = f"{_DAYS[day.weekday()]}, {MONTHS[day.month - 1]} {day.day}"

    def judge(reply: Answer) -> bool:
        if _DAYS[day.weekday()] in reply.text or chinese[-3:] in reply.text:
            return True
        return re.search(rf"(?<!\d){day.day}(?!\d)", reply.text) is not None

    answer = {"en": f"Today is {english}.", "zh": f"今天是{chinese}。"}[language]
    text = spoken(random, language, _worded(random, language, "today"))
    return _made(language, f"today|{chinese}", system_prompt(day), text, answer, judge)


def _told(random: Random, language: Language) -> Chat:
    """The system prompt has facts about a shop or a person; one of them is asked for."""
    chosen: list[Told] = random.sample(_WORDINGS[language]["told"], random.choice((1, 2, 2, 3)))
    values = [KINDS[entry.kind](random, language)[0] for entry in chosen]
    told = [filled(entry.sentence, said) for entry, said in zip(chosen, values, strict=True)]
    at = random.randrange(len(chosen))
    opening = random.choice((SYSTEM_PROMPTS[language][0], "", ""))
    text = spoken(random, language, drawn(random, chosen[at].question))
    answer = told[at].replace("用户叫", "你叫").replace("The user is", "You are")
    return _made(
        language,
        f"told|{chosen[at].sentence}|{values[at]}",
        _GAP[language].join(filter(None, (opening, *told))),
        text,
        answer,
        _contains(values[at]),
    )


def _only_about(random: Random, language: Language) -> Chat:
    """A single subject: everything else is turned down with its name."""
    subject = KINDS["subject"](random, language)[0]
    answer = {"en": f"I only talk about {subject}.", "zh": f"我只谈{subject}。"}[language]
    system = _worded(random, language, "only", subject)
    asked = _inner(random, language)
    return _under(asked, f"only|{subject}", system, answer, _contains(subject))


_MAKERS: tuple[Callable[[Random, Language], Chat], ...] = (
    *(_named, _named, _named, _ended, _ended, _yes_or_no, _yes_or_no, _short, _short),
    *(_today, _today, _today, _told, _told, _told, _only_about),
)


def make(random: Random, language: Language) -> Chat:
    """A question under a system prompt that says how to answer."""
    if language == "en" and random.random() < 0.1:
        return _cased(random, language)  # Chinese has no case
    return random.choice(_MAKERS)(random, language)


TASKS = (Task("system", make, weight=6),)
