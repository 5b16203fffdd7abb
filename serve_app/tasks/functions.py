"""Small Python functions, written out with names that differ from one to the next.

The kinds stand in `functions.yaml`. A function here is a kind with its name, its arguments, its
local names and its constant filled in, and calls that show whether a piece of code does the same.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from string import Template
from typing import Any

import yaml

from rayseek.serve_app.tasks.example import Language
from rayseek.serve_app.tasks.running import evaluate, results

_ARGUMENTS = {
    "n": "n x a num number value k m",
    "l": "numbers items values nums data xs",
    "w": "words items names parts",
    "s": "text s word string name",
    "d": "table data d mapping",
}
_PAIRS = {
    "nn": ("a b", "x y", "m n", "first second", "left right", "p q", "u v"),
    "nnn": ("a b c", "x y z", "value low high", "p q r"),
    "ss": ("text part", "a b", "s t", "first second", "word letter"),
    "ds": ("table key", "data name", "d key", "mapping key"),
}
_SPOKEN: dict[Language, dict[str, str]] = {
    "en": {"l": "a list", "w": "a list of words", "s": "a text"},
    "zh": {"l": "列表", "w": "单词列表", "s": "字符串"},
}
_RESULTS = ("result", "total", "res", "out", "answer")
_ITEMS = ("item", "x", "i", "value", "n", "v")


@dataclass(frozen=True, slots=True)
class Kind:
    """`names`, `says` and `body` are templates; `body` has no indentation of its own."""

    names: tuple[Template, ...]
    says: dict[str, Template]
    body: Template
    arguments: tuple[tuple[str, ...], ...]
    constant: bool
    calls: tuple[tuple[Any, ...], ...]
    spoken: dict[str, Template]  # as `says`, where no argument has a name yet: "a list"


@dataclass(frozen=True, slots=True)
class Function:
    """One written function. `says`: what it does; `body`: its lines, indented."""

    name: str
    arguments: tuple[str, ...]
    says: str
    body: tuple[str, ...]
    kind: Kind

    @property
    def head(self) -> str:
        return f"def {self.name}({', '.join(self.arguments)}):"

    @property
    def source(self) -> str:
        return "\n".join((self.head, *self.body)) + "\n"


def _choices(letters: str) -> tuple[tuple[str, ...], ...]:
    """The names that arguments of these types may have."""
    if letters in _PAIRS:
        return tuple(tuple(names.split()) for names in _PAIRS[letters])
    chosen: list[tuple[str, ...]] = [()]
    for letter in letters:
        chosen = [
            (*names, other)
            for names in chosen
            for other in _ARGUMENTS[letter].split()
            if other not in names
        ]
    return tuple(chosen)


def _spoken(says: str, letters: str, language: Language) -> Template:
    """The description with "a list" and "a text" in place of the argument's name."""
    words = _SPOKEN[language]
    named = {
        place: words.get(letter if len(letters) == 1 or letter == "l" else "", name)
        for place, letter, name in zip("abc", letters, _choices(letters)[0], strict=False)
    }
    return Template(Template(says).safe_substitute(named))


def _kinds() -> tuple[Kind, ...]:
    entries = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
    return tuple(
        Kind(
            tuple(Template(name) for name in entry["names"].split()),
            {"en": Template(entry["en"]), "zh": Template(entry["zh"])},
            Template("    " + entry["body"].replace("\n", "\n    ")),
            _choices(entry["args"]),
            "$k" in entry["body"],
            tuple(map(tuple, entry["calls"])),
            {
                "en": _spoken(entry["en"], entry["args"], "en"),
                "zh": _spoken(entry["zh"], entry["args"], "zh"),
            },
        )
        for entry in entries
    )


KINDS = _kinds()


def _other(random: Random, names: Sequence[str], taken: Sequence[str]) -> str:
    return random.choice([name for name in names if name not in taken])


def write(
    random: Random, language: Language, kind: Kind, *, plain: bool = False, name: str = ""
) -> Function:
    """A function of this kind. plain: nobody has named anything, so it has the kind's first names
    (only a constant is by chance); name: what it is called where the kind's names will not do."""
    arguments = kind.arguments[0] if plain else random.choice(kind.arguments)
    fields: dict[str, object] = dict(zip("abc", arguments, strict=False))
    fields["r"] = _RESULTS[0] if plain else _other(random, _RESULTS, arguments)
    fields["i"] = _other(random, _ITEMS[: 2 if plain else None], arguments)
    if kind.constant:
        fields["k"] = random.randint(2, 20)
    called = kind.names[0] if plain else random.choice(kind.names)
    fields["f"] = name or called.substitute(fields)
    body = kind.body.substitute(fields).split("\n")
    says = (kind.spoken if plain else kind.says)[language].substitute(fields)
    return Function(str(fields["f"]), arguments, says, tuple(body), kind)


def same_results(function: Function, source: str, name: str | None) -> bool:
    """Whether a program's function returns what this one does. name: as in `running.results`."""
    try:
        ast.parse(source)
    except (SyntaxError, ValueError):
        return False
    expected = evaluate(function.source, function.name, function.kind.calls)
    return results(source, name, function.kind.calls) == expected
