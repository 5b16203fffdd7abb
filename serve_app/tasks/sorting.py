"""Putting things in order: two to five numbers up or down, words by the alphabet.

The key is the set of items and the direction: another arrangement of held-out items, or another
wording around them, is held out too.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

from rayseek.serve_app.tasks.asking import chat, phrase
from rayseek.serve_app.tasks.example import Chat, Language, Task
from rayseek.serve_app.tasks.judging import lists_numbers, lists_words
from rayseek.serve_app.tasks.words import ANIMALS, FOODS, OBJECTS

_UP: Mapping[Language, tuple[str, ...]] = {
    "en": (
        "(sort|order|arrange) (these numbers|the numbers|the following numbers|)(:|) {items}",
        "(sort|arrange|put) {items} in ascending order.",
        "(sort|order|arrange) (these numbers|the numbers|) from (smallest|lowest) to "
        "(largest|biggest|highest): {items}",
        "(sort|order) {items} from (small to large|low to high|smallest to largest).",
        "put (these|these numbers|) in (ascending|increasing) order: {items}",
        "(can you sort|sort) (these|this list|the list)(:|) {items}?",
        "sort ascending: {items}",
    ),
    "zh": (
        "(把|将){items}(从小到大|按从小到大的顺序|按升序)(排列|排序|排好)。",
        "(从小到大排列|从小到大排序|升序排列|给这些数排序|把这些数从小到大排列)：{items}",
        "{items}从小到大怎么排？",
    ),
}
_DOWN: Mapping[Language, tuple[str, ...]] = {
    "en": (
        "(sort|arrange|put) {items} in descending order.",
        "(sort|order|arrange) (these numbers|the numbers|) from (largest|biggest|highest) to "
        "(smallest|lowest): {items}",
        "(sort|order) {items} from (large to small|high to low|largest to smallest).",
        "put (these|these numbers|) in (descending|decreasing) order: {items}",
        "sort descending: {items}",
    ),
    "zh": (
        "(把|将){items}(从大到小|按从大到小的顺序|按降序)(排列|排序|排好)。",
        "(从大到小排列|从大到小排序|降序排列|把这些数从大到小排列)：{items}",
        "{items}从大到小怎么排？",
    ),
}
_WORDS: Mapping[Language, tuple[str, ...]] = {
    "en": (
        "(sort|order|arrange|put) (these words|the words|these|) (alphabetically|"
        "in alphabetical order|by alphabet|from A to Z): {items}",
        "(sort|put|arrange) {items} in alphabetical order.",
        "sort (these words|the words|)(:|) {items}",
    ),
    "zh": (
        "(把|将){items}按字母顺序(排列|排序)。",
        "(按字母顺序排列|按字母顺序排序|把这些单词按字母顺序排列)：{items}",
    ),
}
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
    down = random.random() < 0.4
    right = sorted(numbers, reverse=down)
    shown = random.choice(_SEPARATORS[language]).join(map(str, numbers))
    if language == "en" and random.random() < 0.12:
        shown = f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
    elif random.random() < 0.12:
        shown = f"[{', '.join(map(str, numbers))}]"
    return chat(
        random,
        language,
        key=f"{'down' if down else 'up'}|{sorted(numbers)}",
        text=phrase(random, language, (_DOWN if down else _UP)[language], items=shown),
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
        text=phrase(random, language, _WORDS[language], items=separator.join(words)),
        answer=", ".join(right),
        judge=lists_words(right),
    )


def _sort(random: Random, language: Language) -> Chat:
    words = random.random() < (0.22 if language == "en" else 0.12)
    return (_sorted_words if words else _sorted_numbers)(random, language)


TASKS = (Task("sort", _sort, 11),)
