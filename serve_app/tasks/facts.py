"""Short facts from tables: capitals, colours, opposites, amounts, and what is largest.

The tables are in `facts_<language>.yaml`. The key is the fact and the wording it was asked in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import yaml

from rayseek.serve_app.tasks.asking import chat
from rayseek.serve_app.tasks.example import Answer, Chat, Judge, Language, Task, is_held_out
from rayseek.serve_app.tasks.judging import says_yes
from rayseek.serve_app.tasks.wording import drawn, filled, plain, spoken, with_articles
from rayseek.serve_app.tasks.words import capitalised

_FOLLOWING: Mapping[Language, tuple[str, ...]] = {
    "en": ("and {}", "what about {}", "and what about {}", "how about {}", "and for {}"),
    "zh": ("那{}呢", "{}呢", "那么{}呢"),
}
YES_OR_NO: Mapping[Language, tuple[str, str]] = {"en": ("No.", "Yes."), "zh": ("不是。", "是。")}
MOST_ROWS = 50  # a larger table is not asked more often than one of this size


@dataclass(frozen=True, slots=True)
class Row:
    """What is asked about, what is said of it, and all names that a right answer may use."""

    subject: str
    fact: str
    accepted: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Relation:
    """Rows that are asked for in the same wordings; {0} is the subject and {1} the fact.

    stated: a question for yes or no, "" if there is none. reverse: the subject is asked for.
    whole: the fact is a sentence that answers the question, which is the subject.
    """

    name: str
    wordings: tuple[str, ...]
    answer: str
    rows: tuple[Row, ...]
    stated: str
    reverse: bool
    whole: bool


def _relation(name: str, entry: Mapping[str, Any]) -> Relation:
    rows = []
    reverse, whole = entry.get("reverse", False), entry.get("sentence", False)
    for text in entry["rows"].split(";"):
        subject, _, facts = text.strip().partition("=")
        fact, *others = facts.split("/")
        if reverse:
            accepted = (subject.removeprefix("the "),)
        else:  # of a whole sentence only what stands behind it is looked for
            accepted = tuple(others) if whole else (fact, *others)
        rows.append(Row(subject, fact, accepted))
    wordings = tuple(wording.strip() for wording in entry["ask"].split(";"))
    stated = entry.get("stated", "")
    return Relation(name, wordings, entry["answer"], tuple(rows), stated, reverse, whole)


def _relations(language: Language) -> tuple[Relation, ...]:
    """Every relation as often as its size asks for."""
    text = (Path(__file__).parent / f"facts_{language}.yaml").read_text("utf-8")
    tables = [_relation(name, entry) for name, entry in yaml.safe_load(text).items()]
    return tuple(table for table in tables for _ in range(min(len(table.rows), MOST_ROWS)))


_RELATIONS: Mapping[Language, tuple[Relation, ...]] = {
    "en": _relations("en"),
    "zh": _relations("zh"),
}


def names_one_of(accepted: tuple[str, ...]) -> Judge:
    """One of these names stands in the answer, in whatever case, not inside a Latin word."""
    either = "|".join(
        rf"(?<![a-z\d]){re.escape(name.lower())}(?![a-z\d])" if name.isascii() else re.escape(name)
        for name in accepted
    )

    def judge(answer: Answer) -> bool:
        return not answer.calls and re.search(either, answer.text.lower()) is not None

    return judge


def asked(
    random: Random, language: Language, relation: Relation, row: Row, wording: str, how: str = ""
) -> Chat:
    """A question about a row in a wording; `how` goes into the key of a question out of context."""
    subject = drawn(random, row.subject)
    answer = filled(relation.answer, row.subject, row.fact)
    if relation.whole:
        wording = filled(wording, subject)
    text = filled(spoken(random, language, wording), subject, row.fact)
    if language == "en":
        text, answer = (with_articles(part) for part in (text, answer))
    return chat(
        random,
        language,
        key=f"{relation.name}|{row.subject}|{how}{plain(wording)}",
        text=text,
        answer=capitalised(answer),
        judge=names_one_of(row.accepted),
    )


def ask(random: Random, language: Language) -> Chat:
    """A question about one row of a table; one in fifteen is for yes or no."""
    if random.random() < 1 / 15:
        key, text, right = statement(random, language)
        answer, judge = YES_OR_NO[language][right], says_yes(right)
        return chat(random, language, key=f"yes|{key}", text=text, answer=answer, judge=judge)
    relation = random.choice(_RELATIONS[language])
    wording = drawn(random, random.choice(relation.wordings))
    return asked(random, language, relation, random.choice(relation.rows), wording)


def short_question(random: Random, language: Language) -> tuple[Chat, str]:
    """A question that is not held out and its answer in a word or two."""
    while True:
        relation = random.choice(_RELATIONS[language])
        row = random.choice(relation.rows)
        wording = drawn(random, random.choice(relation.wordings))
        question = asked(random, language, relation, row, wording)
        if not relation.whole and not is_held_out("facts", question.key):
            short = row.subject.removeprefix("the ") if relation.reverse else row.fact
            return question, capitalised(short)


def statement(random: Random, language: Language) -> tuple[str, str, bool]:
    """A question for yes or no, as it is typed: (key, text, whether it is so)."""
    relation = random.choice(_RELATIONS[language])
    while not relation.stated:
        relation = random.choice(_RELATIONS[language])
    row, other = random.choice(relation.rows), random.choice(relation.rows)
    fact = row.fact if random.random() < 0.5 else other.fact
    text = spoken(random, language, drawn(random, relation.stated), polite=0.08)
    text = filled(text, row.subject, fact)
    text = with_articles(text) if language == "en" else text
    return f"{relation.name}|{row.subject}|{fact}", text, fact in row.accepted


def follow_up(random: Random, language: Language) -> tuple[Chat, Chat]:
    """Two questions about one table; the second only names what it asks about."""
    relation = random.choice(_RELATIONS[language])
    while relation.whole:
        relation = random.choice(_RELATIONS[language])
    first, second = random.sample(relation.rows, 2)
    wording = drawn(random, random.choice(relation.wordings))
    short = random.choice(_FOLLOWING[language]).replace("{}", "{1}" if relation.reverse else "{0}")
    return (
        asked(random, language, relation, first, wording),
        asked(random, language, relation, second, short, "then "),
    )


TASKS = (Task("facts", ask, weight=8),)
