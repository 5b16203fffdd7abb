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
from rayseek.serve_app.tasks.example import Answer, Chat, Judge, Language, Task
from rayseek.serve_app.tasks.wording import drawn, filled, plain, spoken
from rayseek.serve_app.tasks.words import capitalised

MOST_ROWS = 50  # a larger table is not asked more often than one of this size
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou])")


@dataclass(frozen=True, slots=True)
class Row:
    """What is asked about, what is said of it, and all names that a right answer may use."""

    subject: str
    fact: str
    accepted: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Relation:
    """Rows that are asked for in the same wordings; {0} is the subject and {1} the fact."""

    name: str
    wordings: tuple[str, ...]
    answer: str
    rows: tuple[Row, ...]


def _relation(name: str, entry: Mapping[str, Any]) -> Relation:
    rows = []
    for text in entry["rows"].split(";"):
        subject, _, facts = text.strip().partition("=")
        fact, *others = facts.split("/")
        if entry.get("reverse"):
            accepted = (subject.removeprefix("the "),)
        else:  # of a whole sentence only what stands behind it is looked for
            accepted = tuple(others) if entry.get("sentence") else (fact, *others)
        rows.append(Row(subject, fact, accepted))
    wordings = tuple(wording.strip() for wording in entry["ask"].split(";"))
    return Relation(name, wordings, entry["answer"], tuple(rows))


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


def ask(random: Random, language: Language) -> Chat:
    """A question about one row of a table."""
    relation = random.choice(_RELATIONS[language])
    row = random.choice(relation.rows)
    wording = drawn(random, random.choice(relation.wordings))
    subject = drawn(random, row.subject)
    answer = filled(relation.answer, row.subject, row.fact)
    if subject != row.subject:  # a pattern: it is the question itself
        wording = filled(wording, subject)
    text = filled(spoken(random, language, wording), subject, row.fact)
    if language == "en":
        text, answer = (_ARTICLE.sub(r"\1n ", part) for part in (text, answer))
    return chat(
        random,
        language,
        key=f"{relation.name}|{row.subject}|{plain(wording)}",
        text=text,
        answer=capitalised(answer),
        judge=names_one_of(row.accepted),
    )


TASKS = (Task("facts", ask, weight=8),)
