"""Counting: the items of a list, how often one of them comes, the words of a phrase, and from one
number to another.

What a model of a few layers can not see at once, the answer goes through one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from rayseek.serve_app.tasks.asking import chat, phrase
from rayseek.serve_app.tasks.example import Chat, Language, Task
from rayseek.serve_app.tasks.judging import lists_numbers, says_number
from rayseek.serve_app.tasks.wording import Wordings, wordings_of
from rayseek.serve_app.tasks.words import ANIMALS, COLOURS, FOODS, OBJECTS

_WORDINGS = wordings_of(__file__)
_SMALL_WORDS = "the a my one this that every some no any old big small new good"
_VERBS = "sees likes has wants finds buys takes makes sells keeps"
_FILLERS, _ACTS = _SMALL_WORDS.split(), _VERBS.split()


def _words(language: Language) -> tuple[str, ...]:
    tables = (OBJECTS, ANIMALS, FOODS, COLOURS)
    words = {word for table in tables for word in table[language] if " " not in word}
    return tuple(sorted(words))


_VOCABULARY: Wordings = {"en": _words("en"), "zh": _words("zh")}
_SPELLED = (*(word for word in _VOCABULARY["en"] if word.isalpha()), "strawberry")
_NUMBERS = tuple(map(str, range(100)))


def shown_list(random: Random, language: Language, items: list[str]) -> str:
    """A list as people write one: with commas, sometimes with an "and", in brackets or bare."""
    roll = random.random()
    if language == "zh":
        return ("，" if roll < 0.45 else "、" if roll < 0.75 else ", ").join(items)
    if roll < 0.1 and len(items) > 1:
        return f"{', '.join(items[:-1])} and {items[-1]}"
    return f"[{', '.join(items)}]" if roll < 0.17 else ", ".join(items)


def _count_items(random: Random, language: Language) -> Chat:
    table = _NUMBERS if random.random() < 0.25 else _VOCABULARY[language]
    items = random.sample(table, random.randint(1, 9))
    shown = shown_list(random, language, items)
    text = phrase(random, language, _WORDINGS["items"][language], items=shown)
    count = len(items)
    answer = f"There {'is 1 item' if count == 1 else f'are {count} items'}."
    return chat(
        random,
        language,
        key=f"items|{' '.join(sorted(items))}",
        text=text,
        answer=answer if language == "en" else f"一共有{count}个。",
        judge=says_number(count),
    )


def _count_one(random: Random, language: Language) -> Chat:
    table = _NUMBERS[:20] if random.random() < 0.3 else _VOCABULARY[language]
    item, *others = random.sample(table, random.randint(2, 4))
    count = random.choice((0, 1, 1, 2, 2, 2, 3, 3, 4, 5))
    total = max(count + 1, random.randint(count + 1, count + 4))
    items = [item] * count + [random.choice(others) for _ in range(total - count)]
    random.shuffle(items)
    shown = shown_list(random, language, items)
    text = phrase(random, language, _WORDINGS["times"][language], item=item, items=shown)
    times = "1 time" if count == 1 else f"{count} times"
    said = f"{item} appears {times}." if language == "en" else f"{item}出现了{count}次。"
    return chat(
        random,
        language,
        key=f"{item}|{' '.join(sorted(items))}",
        text=text,
        answer=f"{_gone_through(language, items, item)}: {said}",
        judge=says_number(count),
    )


def _gone_through(language: Language, items: Sequence[str], wanted: str) -> str:
    """The items one after the other; those that are counted with their number."""
    found = 0
    shown = []
    for item in items:
        found += item == wanted
        shown.append(f"{item} ({found})" if item == wanted else item)
    return ("、" if language == "zh" else ", ").join(shown)


def _count_words(random: Random, language: Language) -> Chat:
    nouns = _VOCABULARY["en"]
    words = [random.choice(_FILLERS), random.choice(nouns)]
    if random.random() < 0.7:
        words += [random.choice(_ACTS), random.choice(_FILLERS), random.choice(nouns)]
    if random.random() < 0.5:
        words += ["and", random.choice(nouns)]
    if random.random() < 0.3:
        words.insert(0, random.choice(("today", "now", "here", "sometimes")))
    count, shown = len(words), " ".join(words)
    return chat(
        random,
        language,
        key=f"words|{shown}",
        text=phrase(random, language, _WORDINGS["phrase"][language], items=shown),
        answer=f"There are {count} words." if language == "en" else f"一共有{count}个单词。",
        judge=says_number(count),
    )


def _count_letter(random: Random, language: Language) -> Chat:
    """The answer spells the word first: its tokens do not show its letters."""
    word = random.choice(_SPELLED)
    letter = random.choice(word)
    count = word.count(letter)
    spelled = _gone_through(language, word, letter)
    times = f"{letter} appears {count} time{'' if count == 1 else 's'}."
    return chat(
        random,
        language,
        key=f"letter {letter}|{word}",
        text=phrase(random, language, _WORDINGS["letters"][language], letter=letter, word=word),
        answer=f"{spelled}: {times if language == 'en' else f'{letter}出现了{count}次。'}",
        judge=says_number(count),
    )


def _count_up(random: Random, language: Language) -> Chat:
    low = random.choice((0, 1, 1, 1, random.randint(0, 12), random.randint(0, 90)))
    values = list(range(low, low + random.randint(3, 9)))
    kind = "range"
    if random.random() < 0.35:
        kind = "down"
        values.reverse()
    return chat(
        random,
        language,
        key=f"{values[0]} to {values[-1]}",
        text=phrase(random, language, _WORDINGS[kind][language], a=values[0], b=values[-1]),
        answer=", ".join(map(str, values)),
        judge=lists_numbers(values),
    )


def _count(random: Random, language: Language) -> Chat:
    roll = random.random()
    if roll < 0.08:
        return _count_letter(random, language)
    if roll < 0.38:
        return _count_items(random, language)
    if roll < 0.72:
        return _count_one(random, language)
    if roll < (0.84 if language == "en" else 0.76):
        return _count_words(random, language)
    return _count_up(random, language)


TASKS = (Task("count", _count, 10),)
