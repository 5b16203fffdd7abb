"""One question in many wordings: patterns with alternatives, politeness, and careless typing.

    (what is|what's) the capital of {0}      alternatives; an empty one makes a part optional
    spoken(random, "en", "what is {0}", 0.3) a decorated, perhaps mistyped form of it

Noise is put on a wording before its slots `{0}` are filled, so what must be copied is never
mistyped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from random import Random

import yaml

from rayseek.serve_app.tasks.example import Language
from rayseek.serve_app.tasks.words import capitalised

Wordings = Mapping[Language, tuple[str, ...]]
_Parts = tuple["str | tuple[_Parts, ...]", ...]
_TOKEN = re.compile(r"[()|]|[^()|]+")
_WORD = re.compile(r"(?<![\w{])[a-z]{4,}(?![\w}])", re.IGNORECASE)
_SLOT = re.compile(r"\{(\w+)\}")
_NOT_LETTERS = re.compile(r"[\W_]+")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou])")

# What may stand before or after a question; {} is the question.
_POLITE: dict[Language, tuple[str, ...]] = {
    "en": (
        "please tell me: {}", "tell me, {}", "can you tell me: {}", "hi, {}", "hello! {}",
        "hey, {}", "excuse me, {}", "quick question: {}", "one question: {}", "so, {}", "ok, {}",
        "{} please", "{}, please", "{} thanks", "I want to know: {}", "a question: {}", "well, {}",
        "and {}", "could you tell me: {}", "dear assistant, {}", "now {}", "sorry, {}",
    ),
    "zh": (
        "请问{}", "请告诉我，{}", "你好，{}", "我想知道，{}", "问一下，{}", "请问一下，{}",
        "那么{}", "{}谢谢", "麻烦问一下，{}", "告诉我，{}", "能告诉我{}吗", "嗨，{}",
        "好的，{}", "想问问{}",
    ),
}  # fmt: skip


def _parse(tokens: list[str], inside: bool) -> _Parts:
    """One level of a pattern; consumes `tokens` up to its closing bracket."""
    branches: list[list[str | tuple[_Parts, ...]]] = [[]]
    while tokens:
        token = tokens.pop(0)
        if token == "(":
            branches[-1].append(tuple(_branches(tokens)))
        elif token == "|" and inside:
            branches.append([])
        elif token == ")" and inside:
            break
        else:
            branches[-1].append(token)
    return (tuple(tuple(branch) for branch in branches),) if inside else tuple(branches[0])


def _branches(tokens: list[str]) -> tuple[_Parts, ...]:
    (branches,) = _parse(tokens, inside=True)
    assert isinstance(branches, tuple)
    return branches


@cache
def _parsed(pattern: str) -> _Parts:
    return _parse(_TOKEN.findall(pattern), inside=False)


def _drawn(parts: _Parts, random: Random) -> str:
    return "".join(
        part if isinstance(part, str) else _drawn(part[int(random.random() * len(part))], random)
        for part in parts
    )


def drawn(random: Random, pattern: str) -> str:
    """One of the wordings that a pattern stands for. Alternatives are in round brackets."""
    return _drawn(_parsed(pattern), random) if "(" in pattern else pattern


def wordings_of(module: str) -> Mapping[str, Wordings]:
    """The patterns of a task, by their name; they are in the YAML file beside its module."""
    text = Path(module).with_suffix(".yaml").read_text("utf-8")
    return {
        name: {language: tuple(patterns) for language, patterns in languages.items()}
        for name, languages in yaml.safe_load(text).items()
    }


def plain(text: str) -> str:
    """What is left of a wording without case, punctuation and spaces; for keys and comparisons."""
    return _NOT_LETTERS.sub("", text.lower())


def with_articles(text: str) -> str:
    """English with "an" before the vowels a, e, i, o, u."""
    return _ARTICLE.sub(r"\1n ", text)


def filled(text: str, *values: object) -> str:
    """`{0}`, `{1}`, ... replaced by the values; other braces stay."""
    return _SLOT.sub(lambda found: str(values[int(found[1])]), text)


def mistyped(random: Random, text: str) -> str:
    """One word of four or more Latin letters with two letters swapped, one lost or one doubled."""
    words = list(_WORD.finditer(text))
    if not words:
        return text
    found = random.choice(words)
    word, at = found[0], random.randrange(1, len(found[0]) - 1)
    match random.randrange(3):
        case 0:
            word = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
        case 1:
            word = word[:at] + word[at + 1 :]
        case _:
            word = word[:at] + word[at] + word[at:]
    return text[: found.start()] + word + text[found.end() :]


def spoken(
    random: Random, language: Language, text: str, end: str = "?", polite: float = 0.15
) -> str:
    """`text` (no end mark, lower-case start) as somebody types it: with end mark and capital, or
    carelessly. Slots stay. polite: how often words such as "please tell me" come with it."""
    chance = random.random()
    if random.random() < polite:
        text = random.choice(_POLITE[language]).replace("{}", text)
    if language == "zh":
        full = {"?": "？", ".": "。", "!": "！"}.get(end, end)
        return text + (full if chance < 0.7 else "" if chance < 0.9 else end)
    if random.random() < 0.06:
        text = mistyped(random, text)
    if chance < 0.68:
        return capitalised(text) + end
    if chance < 0.85:
        return text
    if chance < 0.93:
        return text + end
    return capitalised(text)
