"""Small changes to a text that is given: case, order, a word replaced, removed or repeated,
initials, words joined or split.

The words come from short lists in ever new company: the key is the change and the words.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from random import Random

from rayseek.serve_app.tasks.asking import chat, phrase
from rayseek.serve_app.tasks.example import Chat, Language, Task
from rayseek.serve_app.tasks.judging import says_text
from rayseek.serve_app.tasks.wording import wordings_of
from rayseek.serve_app.tasks.words import ANIMALS, CITIES, COLOURS, FOODS, NAMES, OBJECTS, invented

_WORDINGS = wordings_of(__file__)


def _words(language: Language) -> tuple[str, ...]:
    tables = (OBJECTS, ANIMALS, COLOURS, FOODS)
    return tuple(sorted({w for table in tables for w in table[language] if w.isalpha()}))


_GREETINGS = ("hello", "world", "good", "morning", "friend", "day")
_VOCABULARY = {"en": (*_words("en"), *_GREETINGS), "zh": _words("zh")}
_VERBS = ("sees", "likes", "has", "wants", "finds", "buys", "sold", "took", "lost", "found")
_CAPITALS = tuple(word for word in (*NAMES["en"], *CITIES["en"]) if word.isalpha())


def _some(random: Random, language: Language, low: int, high: int) -> list[str]:
    """A few words, one of them sometimes invented."""
    words = random.sample(_VOCABULARY[language], random.randint(low, high))
    if language == "en" and random.random() < 0.1:
        words[-1] = invented(random)
    return words


def _sentence(random: Random, language: Language) -> tuple[str, str]:
    """A short sentence, and one of its words to work with."""
    who, what = random.choice(ANIMALS[language]), random.choice(OBJECTS[language])
    colour = random.choice(COLOURS[language])
    if language == "zh":
        verb = random.choice(("喜欢", "有一个", "看见", "想要", "买了"))
        return f"{random.choice(NAMES['zh'])}{verb}{colour}的{what}。", random.choice(
            (colour, what)
        )
    verb, end = random.choice(_VERBS), "." if random.random() < 0.6 else ""
    roll = random.random()
    if roll < 0.4:
        return f"The {who} {verb} the {what}{end}", random.choice((who, what, verb))
    if roll < 0.7:
        return f"The {colour} {what} is on the table{end}", random.choice((colour, what, "table"))
    name = random.choice(NAMES["en"])
    return f"{name} {verb} a {colour} {what}{end}", random.choice((name, verb, colour, what))


Edit = tuple[str, str, str, dict[str, object]]  # kind, text, right answer, other fields


def _case(random: Random, language: Language) -> Edit:
    text = " ".join(_some(random, "en", 1, 3))
    if random.random() < 0.2:
        text = _sentence(random, "en")[0].lower()
    roll = random.random()
    if roll < 0.5:
        return "upper", text, text.upper(), {}
    if roll < 0.75:
        shown = text.upper() if random.random() < 0.6 else text.title()
        return "lower", shown, text, {}
    return "title", text, text.title(), {}


def _letters(random: Random, language: Language) -> Edit:
    if random.random() < 0.25:
        word = random.choice(_VOCABULARY["en"])
        # A fact: the wording is in the key.
        which = random.randrange(len(_WORDINGS["spell"][language]))
        return "spell", word, "-".join(word), {"wording": which}
    if random.random() < 0.5:
        word = random.choice(_VOCABULARY["en" if random.random() < 0.7 else language])
        if not word.isascii():
            return "first_sign", word, word[0], {}
        return "first_letter", word, word[0], {}
    words = [random.choice((*_CAPITALS, *map(str.title, _some(random, "en", 1, 1))))
             for _ in range(random.randint(2, 4))]  # fmt: skip
    return "acronym", " ".join(words), "".join(word[0] for word in words), {}


def _order(random: Random, language: Language) -> Edit:
    words = _some(random, language, 2, 5)
    text = " ".join(words)
    roll = random.random()
    if roll < 0.25:
        return "last_word", text, words[-1], {}
    if roll < 0.4:
        return "first_word", text, words[0], {}
    if roll < 0.75:
        return "reverse", text, " ".join(reversed(words)), {}
    return "join", text, ", ".join(words), {}


def _change(random: Random, language: Language) -> Edit:
    if random.random() < 0.4:
        text, old = _sentence(random, language)
        tables = (ANIMALS[language], OBJECTS[language], COLOURS[language], _VERBS)
        alike = next((table for table in tables if old in table), NAMES[language])
        new = random.choice(alike)
        edge = r"\b" if language == "en" else ""
        right = re.sub(f"{edge}{re.escape(old)}{edge}", new, text)
        return "replace", text, right, {"old": old, "new": new}
    words = _some(random, language, 3, 5)
    text = " ".join(words)
    at = random.randrange(len(words))
    old = words[at]
    if random.random() < 0.4:
        del words[at]
        return "remove", text, " ".join(words), {"old": old}
    new = random.choice(_VOCABULARY[language])
    words[at] = new
    return "replace", text, " ".join(words), {"old": old, "new": new}


def _copy(random: Random, language: Language) -> Edit:
    if random.random() < 0.5:
        text = " ".join(_some(random, language, 2, 5))
        if random.random() < 0.4:
            text = _sentence(random, language)[0]
        return "say", text, text, {}
    word, n = _some(random, language, 1, 1)[0], random.randint(2, 6)
    return "repeat", word, " ".join([word] * n), {"n": n}


_EDITS: tuple[Callable[[Random, Language], Edit], ...]
_EDITS = (_case, _letters, _order, _order, _change, _change, _copy)


def _edit(random: Random, language: Language) -> Chat:
    kind, text, right, fields = random.choice(_EDITS)(random, language)
    wordings = _WORDINGS[kind][language]
    if "wording" in fields:
        wordings = (wordings[int(str(fields["wording"]))],)
    others = " ".join(map(str, fields.values()))
    return chat(
        random,
        language,
        key=f"{text.lower()}|{right.lower()}|{others}",
        text=phrase(random, language, wordings, text=text, **fields),
        answer=right,
        judge=says_text(right),
    )


TASKS = (Task("edits", _edit, 8),)
