"""Functions that nobody has: invented names and parameters, so that calls must be read, not known.

Either the question names the function ("call find_tozas with lane 7"), or it uses the words of the
description ("what is the morun of kasip" for a function that gets the morun of a tavel).
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

from rayseek.serve_app.tasks.example import Language
from rayseek.serve_app.tasks.tool_specs import LANGUAGES, Parameter, Spec, kept
from rayseek.serve_app.tasks.tool_values import Value
from rayseek.serve_app.tasks.wording import drawn, wordings_of
from rayseek.serve_app.tasks.words import OBJECTS, capitalised, invented, invented_name

_VERBS = ("get", "find", "set", "start", "run", "check", "make", "load", "count", "send", "do")
_NOUNS = ("size", "level", "owner", "title", "mode", "color", "amount", "key", "value", "target")
_KINDS = ("word", "word", "thing", "city", "name", "small", "percent", "code", "flag", "pick")

_WORDINGS = wordings_of(__file__)
_JOINS: Mapping[Language, tuple[str, ...]] = {"en": (" and ", ", "), "zh": ("，", "，")}
_SAYS: Mapping[Language, tuple[tuple[str, str], ...]] = {
    "en": (
        ("{word}", "The result is {word}."),
        ("{die}", "The result is {die}."),
        ('{"{field}": {die}}', "The {field} is {die}."),
        ('{"{field}": "{word}"}', "The {field} is {word}."),
    ),
    "zh": (
        ("{word}", "结果是{word}。"),
        ("{die}", "结果是 {die}。"),
        ('{"{field}": {die}}', "{field} 是 {die}。"),
    ),
}


def _function_name(random: Random, verb: str, noun: str) -> str:
    roll = random.random()
    if roll < 0.15:
        return verb + capitalised(noun)
    if roll < 0.25:
        return f"{invented(random)}_{noun}"
    return f"{verb}_{noun}"


def _noun(random: Random) -> str:
    roll = random.random()
    if roll < 0.7:
        return invented(random)
    return random.choice(OBJECTS["en"] if roll < 0.85 else _NOUNS)


def _parameter(random: Random, name: str, *, numbers: bool = False) -> Parameter:
    kind = (
        random.choice(("small", "percent", "degrees", "word")) if numbers else random.choice(_KINDS)
    )
    choices: Mapping[Language, tuple[Value, ...]] | None = None
    if kind == "flag":
        choices = dict.fromkeys(LANGUAGES, (("true", True), ("false", False)))
    elif kind == "pick":
        words = [invented(random) for _ in range(3)]
        choices = dict.fromkeys(LANGUAGES, tuple((word, word) for word in words))
    return Parameter((name,), kind, {"en": (), "zh": ()}, choices)


def _about(
    random: Random, kind: str, noun: str, what: str = ""
) -> Mapping[Language, tuple[str, ...]]:
    """A description in each language."""
    texts = {n: random.choice(_WORDINGS[f"about {kind}"][n]) for n in LANGUAGES}
    return {n: (t.replace("{noun}", noun).replace("{what}", what),) for n, t in texts.items()}


def _says(random: Random, language: Language) -> Mapping[Language, tuple[tuple[str, str], ...]]:
    output, answer = random.choice(_SAYS[language])
    field = invented(random)
    return {language: ((output.replace("{field}", field), answer.replace("{field}", field)),)}


def _by_name(random: Random, language: Language) -> Spec:
    """A function that is asked for by its name, with up to three parameters."""
    noun = _noun(random)
    fn = _function_name(random, random.choice(_VERBS), noun)
    names = dict.fromkeys(_noun(random) for _ in range(random.choice((0, 1, 1, 2, 2, 2, 3))))
    pair = random.choice(_WORDINGS["pairs"][language])
    pairs = (pair.replace("{n}", kept(n)).replace("{v}", f"{{{n}}}") for n in names)
    together = random.choice(_JOINS[language]).join(pairs)
    ask = drawn(random, random.choice(_WORDINGS["calls" if names else "plain_calls"][language]))
    wording = ask.replace("{fn}", kept(fn)).replace("{list}", together)
    parameters = {n: _parameter(random, n) for n in names}
    about = _about(random, "call", noun)
    return Spec(fn, (fn,), about, parameters, "", {language: (wording,)}, _says(random, language))


def _by_description(random: Random, language: Language) -> Spec:
    """A function with one parameter that is asked for in the words of its description."""
    verb = random.choice(("get", "set"))
    noun, what = _noun(random), _noun(random)
    said = invented_name(random, language).lower() if random.random() < 0.3 else noun
    fn = _function_name(random, verb, noun)
    about = _about(random, verb, said, what)
    name = what if verb == "get" else random.choice(("value", "level", "to", noun))
    ask = drawn(random, random.choice(_WORDINGS[verb][language]))
    wording = ask.replace("{noun}", kept(said)).replace("{p}", f"{{{name}}}")
    parameter = _parameter(random, name, numbers=verb == "set")
    many = name if verb == "get" and not parameter.choices else ""
    asks, says = {language: (wording,)}, _says(random, language)
    return Spec(fn, (fn,), about, {name: parameter}, many, asks, says)


def invented_spec(random: Random, language: Language) -> Spec:
    """A function with a wording in this language."""
    make = _by_name if random.random() < 0.6 else _by_description
    return make(random, language)
