"""Functions that the small model may be offered: real-looking ones and ones that nobody has.

A `Spec` is what a function is about; `declared` makes one declaration of it, with one of its names,
descriptions and parameter names, as the API takes it. The real-looking ones are in `tools.yaml`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import yaml

from rayseek.serve_app.tasks.example import Language
from rayseek.serve_app.tasks.tool_values import KINDS, Value, json_type

LANGUAGES: tuple[Language, ...] = ("en", "zh")
_FOREIGN = 0.4  # of the functions in Chinese conversations have English descriptions
_DESCRIBED = 0.6  # of the parameters have a description


@dataclass(frozen=True, slots=True)
class Parameter:
    """choices: what is said and meant, where only certain values are allowed."""

    names: tuple[str, ...]
    kind: str
    about: Mapping[Language, tuple[str, ...]]
    choices: Mapping[Language, tuple[Value, ...]] | None = None
    optional: bool = False

    def value(self, random: Random, language: Language) -> Value:
        """A value as it is said and as it is meant."""
        if self.choices:
            return random.choice(self.choices[language])
        return KINDS[self.kind](random, language)


@dataclass(frozen=True, slots=True)
class Spec:
    """asks: wordings with {parameter} slots; says: outputs and what to answer to them.

    many: the parameter that may be asked for several values of, "" if there is none.
    """

    key: str
    names: tuple[str, ...]
    about: Mapping[Language, tuple[str, ...]]
    parameters: Mapping[str, Parameter]
    many: str
    asks: Mapping[Language, tuple[str, ...]]
    says: Mapping[Language, tuple[tuple[str, str], ...]]


@dataclass(frozen=True, slots=True)
class Declared:
    """function: the declaration for the API. shown: the parameters' names in it."""

    spec: Spec
    function: Mapping[str, Any]
    shown: Mapping[str, str]

    @property
    def name(self) -> str:
        return str(self.function["name"])


def listed(text: str) -> tuple[str, ...]:
    """The parts of a text between semicolons."""
    return tuple(part.strip() for part in text.split(";"))


def kept(word: str) -> str:
    """A word of a wording that must not be mistyped or changed in case, as a slot of its own."""
    return f"{{={word}}}"


def _choice(text: str) -> Value:
    said, _, meant = text.partition("=")
    return said, {"true": True, "false": False}.get(meant, meant or said)


def _parameter(entry: Mapping[str, Any]) -> Parameter:
    choices = None
    if entry["kind"] == "choice":
        choices = {n: tuple(map(_choice, listed(entry[f"choices_{n}"]))) for n in LANGUAGES}
    about = {n: listed(entry[n]) if n in entry else () for n in LANGUAGES}
    return Parameter(
        listed(entry["names"]), entry["kind"], about, choices, entry.get("optional", False)
    )


def _said(text: str) -> tuple[tuple[str, str], ...]:
    pairs = (pair.partition(" => ") for pair in listed(text))
    return tuple((output, answer) for output, _, answer in pairs)


def _spec(key: str, entry: Mapping[str, Any]) -> Spec:
    return Spec(
        key,
        listed(entry["names"]),
        {n: listed(entry[n]) for n in LANGUAGES},
        {name: _parameter(parameter) for name, parameter in entry["parameters"].items()},
        entry.get("many", ""),
        {n: listed(entry[f"ask_{n}"]) for n in LANGUAGES},
        {n: _said(entry[f"say_{n}"]) for n in LANGUAGES},
    )


def _loaded() -> Mapping[str, Spec]:
    text = Path(__file__).with_name("tools.yaml").read_text("utf-8")
    return {key: _spec(key, entry) for key, entry in yaml.safe_load(text).items()}


SPECS: Mapping[str, Spec] = _loaded()


def _schema(random: Random, language: Language, parameter: Parameter) -> Mapping[str, Any]:
    meant = [value for _, value in parameter.choices[language]] if parameter.choices else []
    if parameter.choices is None:
        schema: dict[str, Any] = {"type": json_type(parameter.kind)}
    elif isinstance(meant[0], bool):
        schema = {"type": "boolean"}
    else:
        schema = {"type": "string", "enum": list(dict.fromkeys(meant))}
    about = parameter.about[language]
    if about and random.random() < _DESCRIBED:
        schema["description"] = random.choice(about)
    return schema


def declared(random: Random, language: Language, spec: Spec) -> Declared:
    """One declaration of a function."""
    if language == "zh" and random.random() < _FOREIGN:
        language = "en"
    shown: dict[str, str] = {}
    for key, parameter in spec.parameters.items():
        name = random.choice(parameter.names)
        shown[key] = key if name in shown.values() else name
    properties = {
        shown[key]: _schema(random, language, parameter)
        for key, parameter in spec.parameters.items()
    }
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    required = [shown[key] for key, entry in spec.parameters.items() if not entry.optional]
    if required and random.random() < 0.85:
        schema["required"] = required
    function = {
        "name": random.choice(spec.names),
        "description": random.choice(spec.about[language]),
        "parameters": schema,
    }
    return Declared(spec, function, shown)
