"""Values of tool arguments and of tool outputs: what is said, and what is meant by it in JSON.

A kind such as "city" or "currency" makes a pair: the words in the question and the JSON value.
Most are the same text; "20 dollars" means the code USD.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random

import yaml

from rayseek.serve_app.tasks.example import Language
from rayseek.serve_app.tasks.words import (
    ANIMALS,
    COLOURS,
    FOODS,
    OBJECTS,
    capitalised,
    city,
    invented,
    invented_name,
    name,
    thing,
)

Value = tuple[str, object]
Kind = Callable[[Random, Language], Value]

INTEGERS = frozenset({"small", "minutes", "percent", "degrees", "dice"})
_CURRENCIES: Mapping[Language, tuple[Value, ...]] = {
    "en": (
        *((code, code) for code in ("USD", "EUR", "CNY", "JPY", "GBP", "CHF", "CAD", "INR")),
        *(("dollars", "USD"), ("euros", "EUR"), ("yuan", "CNY"), ("yen", "JPY")),
        *(("pounds", "GBP"), ("francs", "CHF")),
    ),
    "zh": (
        *(("美元", "USD"), ("欧元", "EUR"), ("人民币", "CNY"), ("日元", "JPY"), ("英镑", "GBP")),
        *(("韩元", "KRW"), ("USD", "USD"), ("EUR", "EUR"), ("CNY", "CNY"), ("JPY", "JPY")),
    ),
}


def _lists() -> Mapping[str, Mapping[Language, tuple[str, ...]]]:
    texts = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
    return {
        kind: {language: tuple(text.split("; ")) for language, text in by_language.items()}
        for kind, by_language in texts.items()
    }


_CHOICES = _lists()
_MONTHS_DAYS = 28


def _same(make: Callable[[Random, Language], object]) -> Kind:
    """A kind that is said as it is meant."""

    def kind(random: Random, language: Language) -> Value:
        value = make(random, language)
        return str(value), value

    return kind


def _listed(kind: str) -> Kind:
    """One of a list, or in one case of six a word that does not exist."""

    def make(random: Random, language: Language) -> object:
        if random.random() < 1 / 6:
            return invented_name(random, language).lower()
        return random.choice(_CHOICES[kind][language])

    return _same(make)


def _between(low: int, high: int) -> Kind:
    return _same(lambda random, language: random.randint(low, high))


def _code(random: Random, language: Language) -> str:
    letters = "".join(random.choice("ABCDEFGHKLMNPRSTUVWXYZ") for _ in range(random.randint(1, 3)))
    return f"{letters}{random.choice(('', '-'))}{random.randint(10, 9999)}"


def _date(random: Random, language: Language) -> str:
    month, day = random.randint(1, 12), random.randint(1, _MONTHS_DAYS)
    return f"{random.randint(2024, 2029)}-{month:02}-{day:02}"


def _clock(random: Random, language: Language) -> str:
    return f"{random.randint(0, 23)}:{random.randrange(0, 60, 5):02}"


def _number(random: Random, language: Language) -> object:
    if random.random() < 0.2:
        return random.randint(1, 999) + 0.5
    return random.randint(1, 10 ** random.randint(1, 4))


def _address(random: Random, language: Language) -> str:
    if random.random() < 0.5:
        return name(random, language)
    who = name(random, "en").lower()
    return f"{who}@{random.choice(('example.com', 'mail.com', invented(random) + '.org'))}"


def _sum(random: Random, language: Language) -> str:
    terms = [str(random.randint(2, 10 ** random.randint(1, 4))) for _ in range(2)]
    sign = random.choice(("+", "-", "*", "/", "*"))
    return random.choice((" ", " ", "")).join((terms[0], sign, terms[1]))


def sum_of(expression: str) -> str:
    """The result of a sum that `_sum` wrote, to two decimals."""
    first, sign, second = re.split(r"\s*([-+*/])\s*", expression)
    a, b = int(first), int(second)
    value = {"+": a + b, "-": a - b, "*": a * b, "/": round(a / b, 2)}[sign]
    return str(int(value) if value == int(value) else value)


def _place(random: Random, language: Language) -> str:
    if language == "zh" or random.random() < 0.4:
        return invented_name(random, language)
    colour, animal = random.choice(COLOURS["en"]), random.choice(ANIMALS["en"])
    return f"The {capitalised(colour)} {capitalised(animal)}"


def _phone(random: Random, language: Language) -> str:
    return f"{random.randint(100, 999)} {random.randint(1000, 9999)}"


def _query(random: Random, language: Language) -> str:
    roll = random.random()
    if roll < 0.2:
        return name(random, language)
    if roll < 0.5:
        return random.choice(_CHOICES["subject"][language])
    table = random.choice((OBJECTS, ANIMALS, FOODS))
    link = "" if language == "zh" else " "
    if roll < 0.75:
        return f"{random.choice(COLOURS[language])}{link}{random.choice(table[language])}"
    return random.choice(table[language]) if roll < 0.9 else invented_name(random, language).lower()


def _path(random: Random, language: Language) -> str:
    file = random.choice(
        (random.choice(OBJECTS["en"]), invented(random), "notes", "README", "data")
    )
    folder = random.choice(("", "", f"{invented(random)}/", "/tmp/", "docs/"))
    return f"{folder}{file}.{random.choice(('txt', 'md', 'json', 'csv', 'py', 'log'))}"


KINDS: Mapping[str, Kind] = {
    "city": _same(city),
    "name": _same(name),
    "thing": _same(thing),
    "word": _same(lambda random, language: invented_name(random, language).lower()),
    "currency": lambda random, language: random.choice(_CURRENCIES[language]),
    "small": _between(1, 12),
    "minutes": _between(1, 120),
    "percent": _between(0, 100),
    "degrees": _between(5, 35),
    "dice": _same(lambda random, language: random.choice((4, 6, 8, 10, 12, 20, 100))),
    "die": _between(1, 100),
    "temp": _between(-20, 40),
    "money": _same(lambda random, language: random.randint(100, 99999) / 100),
    "phone": _same(_phone),
    "number": _same(_number),
    "code": _same(_code),
    "date": _same(_date),
    "clock": _same(_clock),
    "time": _same(_clock),
    "address": _same(_address),
    "sum": _same(_sum),
    "place": _same(_place),
    "query": _same(_query),
    "path": _same(_path),
    **{kind: _listed(kind) for kind in _CHOICES},
}  # fmt: skip


def json_type(kind: str) -> str:
    """The JSON schema's type of a kind's values."""
    return "integer" if kind in INTEGERS else "number" if kind == "number" else "string"
