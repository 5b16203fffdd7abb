"""Questions about an uploaded file or about web pages, in the prompts of DeepSeek's web and app.

The contents are a few facts with names and values that the model can not know (`reading.yaml`); the
answer copies one and, from web pages, cites its page. The key is the fact and its value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import yaml

from rayseek.serve_app.tasks.asking import chat, some_day
from rayseek.serve_app.tasks.example import Answer, Chat, Judge, Language, Task
from rayseek.serve_app.tasks.tool_values import KINDS
from rayseek.serve_app.tasks.wording import drawn, filled, spoken, with_articles
from rayseek.serve_app.tasks.words import (
    ANIMALS,
    COLOURS,
    OBJECTS,
    capitalised,
    invented,
    invented_name,
    name,
)
from rayseek.serve_app.vendor_prompts import File, SearchResult, file_prompt, search_prompt

_TEXTS: Mapping[Language, Mapping[str, Any]] = yaml.safe_load(
    Path(__file__).with_suffix(".yaml").read_text("utf-8")
)
_PERSONS = {"city", "colour", "animal", "phone"}  # topics that are about somebody
_THINGS = {"price", "code", "place"}
_PAIRED = 0.4  # of the files are lines "key: value"


@dataclass(frozen=True, slots=True)
class Stated:
    """A fact as it stands in a text, how it is asked for ({0}: the subject) and answered."""

    text: str
    subject: str
    question: str
    answer: str
    value: str


def _subject(random: Random, language: Language, topic: str) -> str:
    if topic in _PERSONS:
        return name(random, language)
    if topic in _THINGS:
        return random.choice(OBJECTS[language])
    return invented_name(random, language)


def _fact(random: Random, language: Language) -> Stated:
    line: str = random.choice(_TEXTS[language]["facts"])
    topic, sentence, questions, kind = line.split(" = ")
    subject = _subject(random, language, topic)
    if kind in ("colour", "animal"):
        value = random.choice((COLOURS if kind == "colour" else ANIMALS)[language])
    else:
        value = KINDS[kind](random, language)[0]
    text = filled(sentence, subject, value)
    if language == "en":
        text = capitalised(with_articles(text))
    question = drawn(random, random.choice(questions.split("; ")))
    return Stated(text, subject, question, text, value)


def _pair(random: Random, language: Language) -> Stated:
    """A line with an invented key."""
    texts = _TEXTS[language]
    key = invented(random) if language == "en" else invented_name(random, language)
    kind = random.choice(("code", "small", "city", "name", "thing", "clock", "date", "word"))
    value = KINDS[kind](random, language)[0]
    question = drawn(random, random.choice(texts["pair_question"].split("; ")))
    text, answer = (filled(texts[form], key, value) for form in ("pair", "pair_answer"))
    return Stated(text, key, question, answer, value)


def _says(value: str, page: int) -> Judge:
    """The value stands in the answer, and the citation of its page where there are pages."""
    cited = f"[citation:{page}]" if page else ""

    def judge(answer: Answer) -> bool:
        return not answer.calls and value.lower() in answer.text.lower() and cited in answer.text

    return judge


def _facts(
    random: Random, language: Language, write: Callable[[Random, Language], Stated]
) -> tuple[list[Stated], int]:
    """Some facts, one of each subject, and which is asked for."""
    made = (write(random, language) for _ in range(random.choice((2, 2, 3, 4))))
    facts = list({fact.subject: fact for fact in made}.values())
    return facts, random.randrange(len(facts))


def _asked(
    random: Random, language: Language, fact: Stated, prompt: Callable[[str], str], page: int = 0
) -> Chat:
    """The question for a fact in a prompt around it."""
    question = filled(spoken(random, language, fact.question, polite=0.05), fact.subject)
    cited = f"{fact.answer[:-1]}[citation:{page}]{fact.answer[-1]}"
    return chat(
        random,
        language,
        key=f"{fact.text}|{page > 0}",
        text=prompt(question),
        answer=cited if page else fact.answer,
        judge=_says(fact.value, page),
    )


def read(random: Random, language: Language) -> Chat:
    """A question about a file."""
    write = _pair if random.random() < _PAIRED else _fact
    facts, at = _facts(random, language, write)
    files: str = _TEXTS[language]["files"]
    gap = "\n" if write is _pair or random.random() < 0.5 else " "
    file = File(random.choice(files.split("; ")), gap.join(fact.text for fact in facts))
    return _asked(random, language, facts[at], lambda question: file_prompt([file], question))


def search(random: Random, language: Language) -> Chat:
    """A question about web pages."""
    facts, at = _facts(random, language, _fact)
    pages = [SearchResult(fact.text, title=invented(random).capitalize()) for fact in facts]
    day = some_day(random)

    def prompt(question: str) -> str:
        return search_prompt(pages, question, date=day, language=language)

    return _asked(random, language, facts[at], prompt, at + 1)


# The prompt around web pages is longer than everything else, so it is a task of its own.
TASKS = (Task("reading", read, weight=3.5), Task("search", search, weight=0.5))
