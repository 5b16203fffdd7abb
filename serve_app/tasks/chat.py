"""Small talk and questions about the system itself, in many wordings with one answer each.

The topics are in `chat_<language>.yaml` (the model, courtesies) and `notions_<language>.yaml` (the
server, the architecture). A question is a pattern of its topic, or a name of a notion in a pattern
that all notions share; the key is its topic and its wording without politeness and typing errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

import yaml

from rayseek.serve_app.tasks.asking import chat as asked
from rayseek.serve_app.tasks.example import Answer, Chat, Judge, Language, Task
from rayseek.serve_app.tasks.wording import drawn, filled, plain, spoken

LANGUAGES: tuple[Language, ...] = ("en", "zh")


@dataclass(frozen=True, slots=True)
class Topic:
    """keys: groups of words, lower case; a right answer has one of each group.

    courteous: a greeting or remark, which takes no "please tell me".
    """

    name: str
    answer: str
    keys: tuple[tuple[str, ...], ...]
    wordings: tuple[str, ...]
    names: tuple[str, ...]
    courteous: bool


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(";")) if text else ()


def _topics(language: Language) -> tuple[tuple[Topic, ...], tuple[str, ...]]:
    """All topics of a language and the wordings for its notions."""
    texts = [
        yaml.safe_load((Path(__file__).parent / f"{file}_{language}.yaml").read_text("utf-8"))
        for file in ("chat", "notions")
    ]
    topics = tuple(
        Topic(
            name,
            entry["answer"],
            tuple(tuple(str(group).split("|")) for group in entry["keys"]),
            _listed(entry.get("ask", "")),
            _listed(entry.get("names", "")),
            entry.get("plain", False),
        )
        for text in texts
        for name, entry in text["topics"].items()
    )
    return topics, tuple(texts[0]["notion"])


_LOADED = {language: _topics(language) for language in LANGUAGES}
TOPICS: Mapping[Language, tuple[Topic, ...]] = {n: topics for n, (topics, _) in _LOADED.items()}
NOTION_WORDINGS: Mapping[Language, tuple[str, ...]] = {
    n: words for n, (_, words) in _LOADED.items()
}


def mentions(keys: tuple[tuple[str, ...], ...]) -> Judge:
    """The answer calls no tool and has a word of each group, in whatever case."""

    def judge(answer: Answer) -> bool:
        text = answer.text.lower()
        return not answer.calls and all(any(word in text for word in group) for group in keys)

    return judge


def _wording(random: Random, language: Language, topic: Topic) -> str:
    if topic.names:
        pattern = drawn(random, random.choice(NOTION_WORDINGS[language]))
        return filled(pattern, random.choice(topic.names))
    return drawn(random, random.choice(topic.wordings))


def ask(random: Random, language: Language) -> Chat:
    """A question about the system, or a greeting."""
    topic = random.choice(TOPICS[language])
    wording = _wording(random, language, topic)
    if topic.courteous:
        text = spoken(random, language, wording, random.choice(".!."), polite=0)
    else:
        text = spoken(random, language, wording)
    return asked(
        random,
        language,
        key=f"{topic.name}|{plain(wording)}",
        text=text,
        answer=topic.answer,
        judge=mentions(topic.keys),
    )


TASKS = (Task("chat", ask, weight=9),)
