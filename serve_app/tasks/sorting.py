"""Putting things in order: two to five numbers up or down, words by the alphabet.

The key is the set of items and the direction: another arrangement of held-out items, or another
wording around them, is held out too.
"""

from __future__ import annotations

from random import Random

from rayseek.serve_app.tasks.asking import chat, phrase
from rayseek.serve_app.tasks.example import Chat, Language, Task
from rayseek.serve_app.tasks.judging import lists_numbers, lists_words
from rayseek.serve_app.tasks.wording import wordings_of
from rayseek.serve_app.tasks.words import ANIMALS, FOODS, OBJECTS

_WORDINGS = wordings_of(__file__)
_SEPARATORS = {"en": (", ", ", ", ", ", " ", ","), "zh": ("，", "，", "、", ", ", " ")}
_VOCABULARY = sorted(
    word for word in {*OBJECTS["en"], *ANIMALS["en"], *FOODS["en"]} if word.isalpha()
)


def _sorted_numbers(random: Random, language: Language) -> Chat:
    count = random.choice((2, 3, 3, 4, 4, 4, 4, 5))
    top = 9 if random.random() < 0.12 else 999 if random.random() < 0.06 else 99
    numbers = random.sample(range(top + 1), count)
    if random.random() < 0.05:
        numbers[0] = numbers[-1]
    direction = "down" if random.random() < 0.4 else "up"
    right = sorted(numbers, reverse=direction == "down")
    shown = random.choice(_SEPARATORS[language]).join(map(str, numbers))
    if language == "en" and random.random() < 0.12:
        shown = f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
    elif random.random() < 0.12:
        shown = f"[{', '.join(map(str, numbers))}]"
    return chat(
        random,
        language,
        key=f"{direction}|{sorted(numbers)}",
        text=phrase(random, language, _WORDINGS[direction][language], items=shown),
        answer=", ".join(map(str, right)),
        judge=lists_numbers(right),
    )


def _sorted_words(random: Random, language: Language) -> Chat:
    words = random.sample(_VOCABULARY, random.choice((2, 3, 3, 4)))
    right = sorted(words)
    separator = random.choice(_SEPARATORS["en"])
    return chat(
        random,
        language,
        key=f"a-z|{' '.join(right)}",
        text=phrase(random, language, _WORDINGS["words"][language], items=separator.join(words)),
        answer=", ".join(right),
        judge=lists_words(right),
    )


def _sort(random: Random, language: Language) -> Chat:
    words = random.random() < (0.22 if language == "en" else 0.12)
    return (_sorted_words if words else _sorted_numbers)(random, language)


TASKS = (Task("sort", _sort, 11),)
