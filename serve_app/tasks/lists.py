"""Questions about a list that is given: its largest, smallest, first, last or second item, the
list backwards, and whether something is in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

from rayseek.serve_app.tasks.asking import chat, phrase
from rayseek.serve_app.tasks.counting import shown_list
from rayseek.serve_app.tasks.example import Chat, Judge, Language, Task
from rayseek.serve_app.tasks.judging import chooses, lists_numbers, lists_words, says_yes
from rayseek.serve_app.tasks.words import ANIMALS, COLOURS, FOODS, NAMES, OBJECTS

Wordings = Mapping[Language, tuple[str, ...]]
_LARGEST: Wordings = {
    "en": (
        "(what|which) is the (largest|biggest|highest|greatest) (number|) in {items}?",
        "which (number|of these|one) is the (largest|biggest|greatest)(:|,) {items}?",
        "find the (largest|biggest|maximum) (number|)(:| in) {items}",
        "(what is the maximum|max) of {items}?",
    ),
    "zh": (
        "{items}(中|里|里面)(最大的数是|最大的是|哪个最大|哪个数最大)？",
        "(哪个数最大|找出最大的数|最大的数是哪个)：{items}",
    ),
}
_SMALLEST: Wordings = {
    "en": (
        "(what|which) is the (smallest|lowest|least) (number|) in {items}?",
        "which (number|of these|one) is the (smallest|lowest)(:|,) {items}?",
        "find the (smallest|lowest|minimum) (number|)(:| in) {items}",
        "(what is the minimum|min) of {items}?",
    ),
    "zh": (
        "{items}(中|里|里面)(最小的数是|最小的是|哪个最小|哪个数最小)？",
        "(哪个数最小|找出最小的数|最小的数是哪个)：{items}",
    ),
}
_PLACES: Mapping[str, Wordings] = {
    "first": {
        "en": ("(what is|what's|give me|name) the first (item|element|one|word) (in|of) {items}?",
               "which (item|one) (is|comes) first(:| in) {items}?",
               "first (item|element) of {items}?"),
        "zh": ("{items}(中|里|的)第一(个|项)是(什么|哪个)？", "第一个是什么：{items}"),
    },
    "second": {
        "en": ("(what is|what's|give me|name) the second (item|element|one|word) (in|of) {items}?",
               "which (item|one) (is|comes) second(:| in) {items}?"),
        "zh": ("{items}(中|里|的)第二(个|项)是(什么|哪个)？", "第二个是什么：{items}"),
    },
    "third": {
        "en": ("(what is|what's|give me|name) the third (item|element|one|word) (in|of) {items}?",
               "which (item|one) (is|comes) third(:| in) {items}?"),
        "zh": ("{items}(中|里|的)第三(个|项)是(什么|哪个)？", "第三个是什么：{items}"),
    },
    "last": {
        "en": ("(what is|what's|give me|name) the last (item|element|one|word) (in|of) {items}?",
               "which (item|one) (is|comes) last(:| in) {items}?",
               "last (item|element) of {items}?"),
        "zh": ("{items}(中|里|的)最后一(个|项)是(什么|哪个)？", "最后一个是什么：{items}"),
    },
}  # fmt: skip
_AT = {"first": 0, "second": 1, "third": 2, "last": -1}
_AT_ZH = {"first": "第一个", "second": "第二个", "third": "第三个", "last": "最后一个"}
_REVERSE: Wordings = {
    "en": (
        "reverse (this list|the list|these|the order of|)(:|) {items}",
        "(write|put|list) {items} in reverse order.",
        "(write|list) (these|this list) backwards: {items}",
        "reverse {items}.",
    ),
    "zh": (
        "(把|将){items}(倒过来|反过来)(写|排列)。",
        "(倒序写出|反过来写|把列表倒过来|反转列表)：{items}",
    ),
}
_MEMBER: Wordings = {
    "en": (
        "is {item} (in|part of) (this list|the list|this)(:|?) {items}",
        "does (this list|the list) (contain|have|include) {item}(:|?) {items}",
        "is {item} in {items}?",
    ),
    "zh": (
        "{items}(里|中|里面)有{item}吗？",
        "{item}在(列表|列表里|这里面)吗：{items}",
        "(列表|下面)里有没有{item}：{items}",
    ),
}


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
    text = phrase(
        random,
        language,
        (_LARGEST if largest else _SMALLEST)[language],
        items=shown_list(random, language, items),
    )
    kind = "largest" if largest else "smallest"
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
    text = phrase(
        random, language, _PLACES[place][language], items=shown_list(random, language, items)
    )
    answer = f"The {place} item is {right}."
    if language == "zh":
        answer = f"{_AT_ZH[place]}是{right}。"
    key = f"{place}|{' '.join(sorted(items))}"
    return chat(random, language, key=key, text=text, answer=answer, judge=_one_of(right, items))


def _reverse(random: Random, language: Language) -> Chat:
    items = _items(random, language, random.randint(2, 5))
    right = items[::-1]
    digits = items[0].isdigit()
    return chat(
        random,
        language,
        key=f"reverse|{' '.join(items)}",
        text=phrase(
            random, language, _REVERSE[language], items=shown_list(random, language, items)
        ),
        answer=", ".join(right),
        judge=lists_numbers(list(map(int, right))) if digits else lists_words(right),
    )


def _member(random: Random, language: Language) -> Chat:
    item, *items = _items(random, language, random.randint(3, 6))
    inside = random.random() < 0.5
    if inside:
        item = random.choice(items)
    text = phrase(
        random, language, _MEMBER[language], item=item, items=shown_list(random, language, items)
    )
    answer = f"{'Yes' if inside else 'No'}, {item} is {'' if inside else 'not '}in the list."
    if language == "zh":
        answer = f"{'有' if inside else '没有'}，{item}{'' if inside else '不'}在列表里。"
    key = f"in|{item}|{' '.join(sorted(items))}"
    return chat(random, language, key=key, text=text, answer=answer, judge=says_yes(inside))


def _list(random: Random, language: Language) -> Chat:
    maker = random.choice((_extreme, _extreme, _place, _place, _reverse, _member))
    return maker(random, language)


TASKS = (Task("lists", _list, 6),)
