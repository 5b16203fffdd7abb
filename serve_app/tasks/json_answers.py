"""Answers in JSON: the fields of a text, a list, a question with its answer.

The fields are asked for in the ways that people ask: by name, by an empty form, by a JSON schema,
or by an example in the system prompt as DeepSeek's guide to JSON mode shows it. Half of the
questions also switch JSON mode on; the others rely on the words alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from random import Random

from rayseek.serve_app.tasks.asking import chat, phrase
from rayseek.serve_app.tasks.example import Chat, Language, Task, is_held_out
from rayseek.serve_app.tasks.judging import says_json
from rayseek.serve_app.tasks.records import Record, records
from rayseek.serve_app.tasks.wording import drawn, wordings_of
from rayseek.serve_app.tasks.words import (
    ANIMALS,
    COLOURS,
    FOODS,
    NAMES,
    OBJECTS,
    capitalised,
    city,
    invented,
    invented_name,
    name,
    thing,
)

_WORDINGS = wordings_of(__file__)
# The guide's own words, with its line breaks and the blanks at their ends.
_GUIDE = (
    "The user will provide some {what}. Please parse the {fields} and output them in JSON format. "
    "\n\nEXAMPLE INPUT: \n{text}\n\nEXAMPLE JSON OUTPUT:\n{form}"
)
_GUIDE_ZH = (
    "用户会提供一段文字。请解析{fields}，并以JSON格式输出。\n\n"
    "输入示例：\n{text}\n\nJSON输出示例：\n{form}"
)
_KNOWN: Mapping[Language, tuple[tuple[str, str], ...]] = {
    "en": (
        ("Which is the highest mountain in the world?", "Mount Everest"),
        ("Which is the longest river in the world?", "The Nile River"),
        ("Which is the largest ocean?", "The Pacific Ocean"),
        ("What is the largest planet?", "Jupiter"),
        ("Who wrote Romeo and Juliet?", "William Shakespeare"),
        ("Which is the fastest animal on land?", "The cheetah"),
        ("How many continents are there?", "Seven"),
    ),
    "zh": (
        ("世界上最高的山是哪座？", "珠穆朗玛峰"),
        ("世界上最长的河是哪条？", "尼罗河"),
        ("中国的首都是哪里？", "北京"),
    ),
}
_BLANK: Mapping[type, object] = {str: "", int: 0, float: 0, bool: False, list: []}
_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array"}


def _dumped(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _named(random: Random, keys: Sequence[str], language: Language) -> str:
    """The keys as a question names them."""
    roll = random.random()
    if roll < 0.35:
        keys = [f'"{key}"' for key in keys]
    elif roll < 0.42:
        keys = [f"`{key}`" for key in keys]
    if language == "zh":
        return ("、" if roll < 0.8 else ", ").join(keys)
    if random.random() < 0.5 or len(keys) == 1:
        return ", ".join(keys)
    return f"{', '.join(keys[:-1])} and {keys[-1]}"


def _asked(random: Random, made: Record) -> Record:
    """The fields that are asked for: all, or some; in the order of the text or another."""
    keys = list(made)
    if random.random() < 0.3:
        keys = random.sample(keys, random.randint(1 if len(keys) <= 2 else 2, len(keys)))
    return {key: made[key] for key in keys}


def _schema(asked: Record) -> str:
    properties = {key: {"type": _TYPES[type(value)]} for key, value in asked.items()}
    return _dumped({"type": "object", "properties": properties, "required": list(asked)})


def _form(random: Random, asked: Record) -> str:
    if random.random() < 0.5:
        return _dumped({key: _BLANK[type(value)] for key, value in asked.items()})
    return _dumped({key: _TYPES[type(value)] for key, value in asked.items()})


def _guide(
    fields: str, text: str, example: Mapping[str, object], language: Language, what: str
) -> str:
    pattern = _GUIDE if language == "en" else _GUIDE_ZH
    return pattern.format(what=what, fields=fields, text=text, form=_dumped(example, indent=4))


def _key(right: Mapping[str, object]) -> str:
    return json.dumps(right, sort_keys=True)


def _reply(
    random: Random, language: Language, right: Mapping[str, object], text: str, system: str | None
) -> Chat:
    return chat(
        random,
        language,
        key=_key(right),
        text=text,
        answer=_dumped(right),
        judge=says_json(right),
        system=system,
        json_mode=random.random() < 0.5,
    )


def _extract(random: Random, language: Language) -> Chat:
    ((made, text),) = records(random, language, 1)
    asked = _asked(random, made)
    fields = _named(random, list(asked), language)
    roll = random.random()
    if roll < 0.5:
        kind, shown = "by_name", {"fields": fields}
    elif roll < 0.65:
        kind, shown = "by_form", {"form": _form(random, asked)}
    elif roll < 0.75 and len(asked) < 4:
        kind, shown = "by_schema", {"form": _schema(asked)}
    else:
        system = drawn(random, random.choice(_WORDINGS["system"][language])).format(fields=fields)
        return _reply(random, language, asked, text, system)
    question = phrase(random, language, _WORDINGS[kind][language], text=text, **shown)
    return _reply(random, language, asked, question, None)


def _by_example(random: Random, language: Language) -> Chat:
    """The system prompt has an example of the same kind; the user sends only a text."""
    (shown, example), (right, text) = records(random, language, 2, most=3)
    while is_held_out("json", _key(shown)):
        (shown, example), (right, text) = records(random, language, 2, most=3)
    fields = _named(random, list(shown), language)
    return _reply(random, language, right, text, _guide(fields, example, shown, language, "text"))


def _question(random: Random, language: Language) -> tuple[str, str]:
    if random.random() < 0.15:
        return random.choice(_KNOWN[language][1:])  # the first is the example
    asked = drawn(random, random.choice(_WORDINGS["questions"][language])).format(
        place=invented_name(random, language) if random.random() < 0.6 else city(random, language),
        name=name(random, language),
        colour=random.choice(COLOURS[language]),
        thing=thing(random, language),
    )
    answer = random.choice((name, city, thing, invented_name))
    return asked, capitalised(answer(random, language))


def _exam(random: Random, language: Language) -> Chat:
    """The guide's own example: a question and its answer from one line of an exam."""
    question, answer = _question(random, language)
    example = _KNOWN[language][0]
    shown = {"question": example[0], "answer": example[1]}
    if random.random() < 0.4:
        other = _question(random, language)
        if not is_held_out("json", _key({"question": other[0], "answer": other[1]})):
            example, shown = other, {"question": other[0], "answer": other[1]}
    space, stop, both = (" ", ".", " and ") if language == "en" else ("", "。", "和")
    told = f"{example[0]}{space}{example[1]}{stop}"
    fields = f'"question"{both}"answer"'
    system = _guide(fields, told, shown, language, "exam text")
    right = {"question": question, "answer": answer}
    return _reply(random, language, right, f"{question}{space}{answer}{stop}", system)


def _list(random: Random, language: Language) -> Chat:
    tables = {"items": OBJECTS, "animals": ANIMALS, "colors": COLOURS, "foods": FOODS,
              "names": NAMES}  # fmt: skip
    key = random.choice(list(tables))
    items: list[str] | list[int] = random.sample(tables[key][language], random.randint(2, 4))
    if random.random() < 0.25:
        key, items = "numbers", random.sample(range(100), random.randint(2, 5))
    if random.random() < 0.3:
        key = invented(random)
    shown = ", ".join(map(str, items))
    text = phrase(random, language, _WORDINGS["lists"][language], key=key, items=shown)
    return _reply(random, language, {key: items}, text, None)


def _json(random: Random, language: Language) -> Chat:
    roll = random.random()
    if roll < 0.65:
        return _extract(random, language)
    if roll < 0.77:
        return _by_example(random, language)
    return (_exam if roll < 0.88 else _list)(random, language)


TASKS = (Task("json", _json, 10),)
