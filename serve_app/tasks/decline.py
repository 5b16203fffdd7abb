"""Questions that the small model can not answer, and its one polite answer to them.

Patterns with slots, in `decline_<language>.yaml`; fillings in `decline_words.yaml`, besides
invented words, random letters and long numbers, so that no list of subjects can be learnt by
heart. The key is the wording with its fillings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random

import yaml

from rayseek.serve_app.tasks.asking import chat
from rayseek.serve_app.tasks.example import Answer, Chat, Language, Task
from rayseek.serve_app.tasks.wording import drawn, plain, spoken
from rayseek.serve_app.tasks.words import (
    ANIMALS,
    NAMES,
    OBJECTS,
    chinese_word,
    invented,
    invented_name,
    name,
)

# What is said, for what it does not know and for what it can not do.
DECLINES: Mapping[Language, Mapping[str, str]] = {
    "en": {
        "unknown": "I am a small demonstration model and do not know that.",
        "unable": "I am a small demonstration model and can not do that.",
    },
    "zh": {
        "unknown": "我是一个小型演示模型，不知道这个。",
        "unable": "我是一个小型演示模型，做不到这个。",
    },
}
_DECLINED = re.compile(
    r"\b(not know|n[o']t know|can ?not|can't|unable|not able|no (access|information|tool|idea|way)"
    r"|n[o']t have|sorry|apologi[sz]e|not (possible|sure)|demonstration model)\b"
    r"|不知道|无法|不能|做不到|不会|不了解|不清楚|没有|抱歉|对不起|演示模型",
    re.IGNORECASE,
)
_SLOT = re.compile(r"\{(\w+)\}")
_FOLDER = Path(__file__).parent
_BEYOND_TOOLS = {"science", "health", "law", "opinion", "how_to", "write", "code"}
_INVENTED_PERSON = 0.4
_INVENTED_TOPIC = 0.12


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(";"))


def _loaded(file: str) -> Mapping[str, Mapping[str, tuple[str, ...]]]:
    text = yaml.safe_load((_FOLDER / f"{file}.yaml").read_text("utf-8"))
    return {
        kind: {group: _split(entries) for group, entries in groups.items()}
        for kind, groups in text.items()
    }


_FILLINGS = _loaded("decline_words")
_PATTERNS: Mapping[Language, tuple[tuple[str, str, tuple[str, ...]], ...]] = {
    language: tuple(
        (kind, group, patterns)
        for kind, groups in _loaded(f"decline_{language}").items()
        for group, patterns in groups.items()
    )
    for language in DECLINES
}


def _gibberish(random: Random, language: Language) -> str:
    if language == "zh":  # Latin letters would not say in which language to answer
        return chinese_word(random, random.randint(2, 6))
    letters = "abcdefghijklmnopqrstuvwxyz" if random.random() < 0.7 else "asdfghjkl1234567890?!."
    return "".join(random.choice(letters) for _ in range(random.randint(3, 10)))


def _person(random: Random, language: Language) -> str:
    if random.random() > _INVENTED_PERSON:
        return random.choice(_FILLINGS[language]["person"])
    if language == "zh":
        return invented_name(random, language)
    return f"{random.choice(NAMES[language])} {invented(random).capitalize()}"


def _topic(random: Random, language: Language) -> str:
    if random.random() < _INVENTED_TOPIC:
        return invented_name(random, language).lower()
    return random.choice(_FILLINGS[language]["topic"])


def _long(random: Random, language: Language) -> str:
    """A number that makes a sum too long: of four to six digits."""
    return str(random.randint(1000, 10 ** random.randint(4, 6)))


_MADE: Mapping[str, Callable[[Random, Language], object]] = {
    "person": _person,
    "topic": _topic,
    "long": _long,
    "gibberish": _gibberish,
    "name": name,
    "thing": lambda random, language: random.choice(OBJECTS[language]),
    "animal": lambda random, language: random.choice(ANIMALS[language]),
    "word": lambda random, language: (
        chinese_word(random, 2) if language == "zh" else invented(random)
    ),
    "Word": invented_name,
    "number": lambda random, language: random.randint(2, 99),
    "year": lambda random, language: random.randint(1066, 2049),
}


def _filling(random: Random, language: Language, slot: str) -> str:
    if slot in _MADE:
        return str(_MADE[slot](random, language))
    return random.choice(_FILLINGS[language][slot])


def declines(answer: Answer) -> bool:
    """The answer says that it does not know or can not, and calls no tool."""
    return not answer.calls and _DECLINED.search(answer.text) is not None


def ask(random: Random, language: Language) -> Chat:
    """A question from outside of what the small model knows."""
    return _asked(random, language, *random.choice(_PATTERNS[language]))


def ask_beyond_tools(random: Random, language: Language) -> Chat:
    """Such a question that no usual tool could answer either."""
    kind, group, patterns = random.choice(_PATTERNS[language])
    while group not in _BEYOND_TOOLS:
        kind, group, patterns = random.choice(_PATTERNS[language])
    return _asked(random, language, kind, group, patterns)


def _asked(
    random: Random, language: Language, kind: str, group: str, patterns: Sequence[str]
) -> Chat:
    wording = drawn(random, random.choice(patterns))
    values = [_filling(random, language, slot) for slot in _SLOT.findall(wording)]
    end = "?" if kind == "unknown" or random.random() < 0.3 else "."
    left = iter(values)
    return chat(
        random,
        language,
        key="|".join((plain(wording), *values)),
        text=_SLOT.sub(lambda _: next(left), spoken(random, language, wording, end)),
        answer=DECLINES[language][kind],
        judge=declines,
        dated=group != "now",  # a prompt that tells the date would answer these
    )


TASKS = (Task("decline", ask, weight=10),)
