"""Questions about a list that is given: its largest, smallest, first, last or second item, the
list backwards, and whether something is in it.
"""

from __future__ import annotations

from random import Random

from rayseek.serve_app.tasks.asking import chat, phrase
from rayseek.serve_app.tasks.counting import shown_list
from rayseek.serve_app.tasks.example import Chat, Judge, Language, Task
from rayseek.serve_app.tasks.judging import chooses, lists_numbers, lists_words, says_yes
from rayseek.serve_app.tasks.wording import wordings_of
from rayseek.serve_app.tasks.words import ANIMALS, COLOURS, FOODS, NAMES, OBJECTS

_WORDINGS = wordings_of(__file__)
_AT = {"first": 0, "second": 1, "third": 2, "last": -1}
_AT_ZH = {"first": "第一个", "second": "第二个", "third": "第三个", "last": "最后一个"}


def _tables(language: Language) -> tuple[tuple[str, ...], ...]:
    return tuple(table[language] for table in (OBJECTS, ANIMALS, FOODS, COLOURS, NAMES))


_VOCABULARY = {"en": _tables("en"), "zh": _tables("zh")}
_NUMBERS = tuple(map(str, range(100)))


def _items(random: Random, language: Language, count: int) -> list[str]:
    table = _NUMBERS if random.random() < 0.25 else random.choice(_VOCABULARY[language])
    return random.sample(table, count)


def _extreme(random: Random, language: Language) -> Chat:
    numbers = random.sample(range(100), random.randint(2, 5))
    largest = random.random() < 0.55
    right = max(numbers) if largest else min(numbers)
    items = list(map(str, numbers))
    kind = "largest" if largest else "smallest"
    shown = shown_list(random, language, items)
    text = phrase(random, language, _WORDINGS[kind][language], items=shown)
    answer = f"The {kind} number is {right}."
    if language == "zh":
        answer = f"最{'大' if largest else '小'}的数是{right}。"
    key = f"{kind}|{sorted(numbers)}"
    return chat(random, language, key=key, text=text, answer=answer, judge=_one_of(right, items))


def _one_of(right: object, items: list[str]) -> Judge:
    return chooses(str(right), items)


def _place(random: Random, language: Language) -> Chat:
    items = _items(random, language, random.randint(3, 5))
    place = random.choice(("first", "first", "last", "last", "second", "third"))
    right = items[_AT[place]]
    shown = shown_list(random, language, items)
    text = phrase(random, language, _WORDINGS[place][language], items=shown)
    answer = f"The {place} item is {right}."
    if language == "zh":
        answer = f"{_AT_ZH[place]}是{right}。"
    key = f"{place}|{' '.join(sorted(items))}"
    return chat(random, language, key=key, text=text, answer=answer, judge=_one_of(right, items))


def _reverse(random: Random, language: Language) -> Chat:
    items = _items(random, language, random.randint(2, 5))
    right = items[::-1]
    digits = items[0].isdigit()
    shown = shown_list(random, language, items)
    return chat(
        random,
        language,
        key=f"reverse|{' '.join(items)}",
        text=phrase(random, language, _WORDINGS["reverse"][language], items=shown),
        answer=", ".join(right),
        judge=lists_numbers(list(map(int, right))) if digits else lists_words(right),
    )


def _member(random: Random, language: Language) -> Chat:
    item, *items = _items(random, language, random.randint(3, 6))
    inside = random.random() < 0.5
    if inside:
        item = random.choice(items)
    shown = shown_list(random, language, items)
    text = phrase(random, language, _WORDINGS["member"][language], item=item, items=shown)
    answer = f"{'Yes' if inside else 'No'}, {item} is {'' if inside else 'not '}in the list."
    if language == "zh":
        answer = f"{'有' if inside else '没有'}，{item}{'' if inside else '不'}在列表里。"
    key = f"in|{item}|{' '.join(sorted(items))}"
    return chat(random, language, key=key, text=text, answer=answer, judge=says_yes(inside))


def _list(random: Random, language: Language) -> Chat:
    maker = random.choice((_extreme, _extreme, _place, _place, _reverse, _member))
    return maker(random, language)


TASKS = (Task("lists", _list, 6),)
