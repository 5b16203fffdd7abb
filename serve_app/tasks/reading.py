"""Questions about an uploaded file or about web pages, in the prompts of DeepSeek's web and app.

The contents are a few facts with names and values that the model can not know (`reading.yaml`); the
answer copies one and, from web pages, cites its page. The key is the fact and its value.
"""

from __future__ import annotations

from collections.abc import Mapping
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
_SEARCHED = 0.15  # of the questions; the prompt around web pages is long
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


def make(random: Random, language: Language) -> Chat:
    """A question about one of several facts."""
    searched = random.random() < _SEARCHED
    write = _pair if not searched and random.random() < _PAIRED else _fact
    made = (write(random, language) for _ in range(random.choice((2, 2, 3, 4))))
    facts = list({fact.subject: fact for fact in made}.values())  # one of each subject
    at = random.randrange(len(facts))
    asked = facts[at]
    question = filled(spoken(random, language, asked.question, polite=0.05), asked.subject)
    answer = asked.answer
    if searched:
        pages = [SearchResult(fact.text, title=invented(random).capitalize()) for fact in facts]
        text = search_prompt(pages, question, date=some_day(random), language=language)
        end = answer[-1]
        answer = f"{answer[:-1]}[citation:{at + 1}]{end}"
    else:
        files: str = _TEXTS[language]["files"]
        file = random.choice(files.split("; "))
        gap = "\n" if write is _pair or random.random() < 0.5 else " "
        text = file_prompt([File(file, gap.join(fact.text for fact in facts))], question)
    return chat(
        random,
        language,
        key=f"{asked.text}|{searched}",
        text=text,
        answer=answer,
        judge=_says(asked.value, at + 1 if searched else 0),
    )


TASKS = (Task("reading", make, weight=4),)
