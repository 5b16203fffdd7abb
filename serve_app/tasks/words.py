"""Words that questions are made of: names, places, things, and words that do not exist.

The lists are long enough that most pairs of them are never seen in training: a model that answers
held-out questions copies the word instead of remembering it. Invented words make sure of that.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from random import Random

import yaml

from rayseek.serve_app.tasks.example import Language

Table = Mapping[Language, tuple[str, ...]]


def _tables() -> Mapping[str, Table]:
    texts = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
    return {
        kind: {
            language: tuple(word.replace("_", " ") for word in text.split())
            for language, text in by_language.items()
        }
        for kind, by_language in texts.items()
    }


_TABLES = _tables()
NAMES, CITIES = _TABLES["names"], _TABLES["cities"]
OBJECTS, ANIMALS, FOODS = _TABLES["objects"], _TABLES["animals"], _TABLES["foods"]
COLOURS = _TABLES["colours"]

_CONSONANTS: tuple[str, ...] = (*"bdfgklmnprstvz", "br", "dr", "gr", "kl", "pl", "st", "tr", "sh")
_VOWELS = "aeiou"
_ENDS: tuple[str, ...] = (*("",) * 4, *"nrslxmk")
_CHINESE = "阿巴贝波卡达德迪多尔菲戈哈加科克拉莱里洛鲁马梅米莫纳尼诺帕皮萨塞西索塔特托维亚伊约"


def invented(random: Random, syllables: int = 0) -> str:
    """A lower-case word of two or three syllables that means nothing: "tozasok"."""
    count = syllables or (2 if random.random() < 0.6 else 3)
    parts = [random.choice(_CONSONANTS) + random.choice(_VOWELS) for _ in range(count)]
    return "".join(parts) + random.choice(_ENDS)


def chinese_word(random: Random, length: int) -> str:
    """Characters that are used to write foreign names, in an order that means nothing."""
    return "".join(random.choice(_CHINESE) for _ in range(length))


def invented_name(random: Random, language: Language) -> str:
    """A name that nobody has: "Tozasok", "莱多尼"; in Chinese questions a fifth are Latin."""
    if language == "en" or random.random() < 0.2:
        return invented(random).capitalize()
    return chinese_word(random, random.choice((2, 2, 3)))


def name(random: Random, language: Language) -> str:
    """A first name: one in six is invented."""
    if random.random() < 1 / 6:
        return invented_name(random, language)
    return random.choice(NAMES[language])


def city(random: Random, language: Language) -> str:
    """A city: one in eight is invented."""
    if random.random() < 1 / 8:
        return invented_name(random, language)
    return random.choice(CITIES[language])


def thing(random: Random, language: Language) -> str:
    """An object, sometimes an animal or a food."""
    table = random.choice((OBJECTS, OBJECTS, OBJECTS, ANIMALS, FOODS))
    return random.choice(table[language])


def capitalised(text: str) -> str:
    """The first letter in upper case, the rest as it is."""
    return text[:1].upper() + text[1:]
