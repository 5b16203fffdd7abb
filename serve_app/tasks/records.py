"""Small records with the sentence that tells them: a person with age and city, an order, a trip.

A record is the material of a JSON question: which fields it has, their values as JSON has them,
and a text in plain words that says them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeAlias

from rayseek.serve_app.tasks.example import Language
from rayseek.serve_app.tasks.words import (
    ANIMALS,
    COLOURS,
    FOODS,
    OBJECTS,
    capitalised,
    city,
    invented,
    invented_name,
    name,
    thing,
)

Scalar = str | int | float | bool
Value: TypeAlias = Scalar | list[str]
Record = dict[str, Value]
_Make = Callable[[Random, Language], Value]


@dataclass(frozen=True, slots=True)
class _Field:
    """Its key (or English|Chinese key), its values, and clauses that say one of them. A truth value
    has two clauses: it is so, it is not."""

    key: str
    make: _Make
    clauses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a sentence is about comes first; the clauses follow in any order."""

    subject: _Field
    fields: tuple[_Field, ...]


def _number(low: int, high: int) -> _Make:
    return lambda random, language: random.randint(low, high)


def _one_of(*choices: str) -> _Make:
    words = choices[0].split() if len(choices) == 1 else choices
    return lambda random, language: random.choice(words)


def _word(table: Mapping[Language, Sequence[str]]) -> _Make:
    return lambda random, language: random.choice(table[language])


def _words(table: Mapping[Language, Sequence[str]]) -> _Make:
    return lambda random, language: random.sample(table[language], random.randint(2, 3))


def _tongues(random: Random, language: Language) -> list[str]:
    return random.sample(_TONGUES, random.randint(2, 3))


def _truth(random: Random, language: Language) -> bool:
    return random.random() < 0.5


def _price(random: Random, language: Language) -> float:
    whole = random.randint(1, 99)
    return whole if random.random() < 0.5 else whole + random.choice((0.5, 0.25, 0.99))


def _time(random: Random, language: Language) -> str:
    return f"{random.randint(7, 21)}:{random.choice(('00', '15', '30', '45'))}"


def _phone(random: Random, language: Language) -> str:
    return f"555-{random.randint(0, 9999):04}"


def _email(random: Random, language: Language) -> str:
    user = invented(random) if language == "zh" else name(random, "en").lower()
    return f"{user}@{random.choice(('mail', 'post', 'example'))}.com"


def _title(random: Random, language: Language) -> str:
    if language == "zh":
        colour, item = random.choice(COLOURS["zh"]), random.choice(OBJECTS["zh"])
        return f"{colour}的{item}"
    item = random.choice((*OBJECTS["en"], *ANIMALS["en"])).title()
    return f"The {random.choice(COLOURS['en']).title()} {item}"


_DAYS = _one_of("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
_JOBS = _one_of("baker chef doctor driver farmer lawyer nurse painter pilot singer teacher writer")
_HOBBIES = _one_of("chess cooking dancing fishing hiking music painting reading running tennis")
_TONGUES = ("English", "French", "German", "Spanish", "Chinese", "Japanese", "Italian")

_ENGLISH = (
    _Kind(
        _Field("name", name, ()),
        (
            _Field("age", _number(5, 90), ("is {} years old", "is {} years old", "is {}")),
            _Field("city", city, ("lives in {}", "lives in {}", "is from {}", "comes from {}")),
            _Field("job", _JOBS, ("works as a {}", "is a {}")),
            _Field("hobby", _HOBBIES, ("likes {}", "enjoys {}")),
            _Field("student", _truth, ("is a student", "is not a student")),
            _Field("languages", _tongues, ("speaks {}",)),
            _Field("email", _email, ("has the email {}", "can be reached at {}")),
            _Field("phone", _phone, ("has the phone number {}",)),
        ),
    ),
    _Kind(
        _Field("customer", name, ()),
        (
            _Field("item", thing, ("orders a {}", "wants a {}", "buys the {}")),
            _Field("quantity", _number(1, 40), ("wants {} of them", "needs {} pieces")),
            _Field("color", _word(COLOURS), ("wants it in {}", "chooses {}")),
            _Field("city", city, ("wants delivery to {}", "lives in {}")),
            _Field("paid", _truth, ("has paid", "has not paid")),
        ),
    ),
    _Kind(
        _Field("product", thing, ()),
        (
            _Field("price", _price, ("costs {} dollars", "is sold for {} dollars")),
            _Field("color", _word(COLOURS), ("is {}", "comes in {}")),
            _Field("stock", _number(0, 99), ("has {} pieces left", "is there {} times")),
            _Field("available", _truth, ("is available", "is not available")),
            _Field("brand", lambda random, _: invented_name(random, "en"), ("is made by {}",)),
        ),
    ),
    _Kind(
        _Field("event", _one_of("meeting party concert lunch workshop dinner talk game"), ()),
        (
            _Field("day", _DAYS, ("is on {}", "takes place on {}")),
            _Field("time", _time, ("starts at {}", "begins at {}")),
            _Field("city", city, ("is in {}", "takes place in {}")),
            _Field("guests", _number(2, 99), ("has {} guests",)),
            _Field("host", name, ("is hosted by {}",)),
        ),
    ),
    _Kind(
        _Field("title", _title, ()),
        (
            _Field("author", name, ("was written by {}", "is by {}")),
            _Field("year", _number(1900, 2025), ("came out in {}", "was published in {}")),
            _Field("pages", _number(40, 900), ("has {} pages",)),
        ),
    ),
    _Kind(
        _Field("name", name, ()),
        (
            _Field("animal", _word(ANIMALS), ("is a {}",)),
            _Field("age", _number(1, 20), ("is {} years old",)),
            _Field("color", _word(COLOURS), ("is {}", "has {} fur")),
            _Field("foods", _words(FOODS), ("eats {}", "likes {}")),
        ),
    ),
)
_CHINESE = (
    _Kind(
        _Field("name|姓名", name, ()),
        (
            _Field("age|年龄", _number(5, 90), ("今年{}岁", "{}岁")),
            _Field("city|城市", city, ("住在{}", "来自{}")),
            _Field(
                "job|职业", _one_of("老师 医生 工人 律师 护士 作家 画家 厨师"), ("是{}", "是一名{}")
            ),
            _Field("hobby|爱好", _one_of("读书 唱歌 跳舞 画画 游泳 跑步 下棋"), ("喜欢{}", "爱{}")),
            _Field("student|学生", _truth, ("是学生", "不是学生")),
            _Field("phone|电话", _phone, ("电话是{}",)),
            _Field("email|邮箱", _email, ("邮箱是{}",)),
        ),
    ),
    _Kind(
        _Field("customer|客户", name, ()),
        (
            _Field("item|商品", thing, ("想买{}", "买了{}")),
            _Field("quantity|数量", _number(1, 40), ("要{}个", "一共要{}个")),
            _Field("color|颜色", _word(COLOURS), ("要{}的", "选了{}")),
            _Field("city|城市", city, ("送到{}", "住在{}")),
        ),
    ),
    _Kind(
        _Field("product|商品", thing, ()),
        (
            _Field("price|价格", _price, ("的价格是{}元", "卖{}元")),
            _Field("color|颜色", _word(COLOURS), ("是{}的",)),
            _Field("stock|库存", _number(0, 99), ("还有{}个", "库存{}个")),
        ),
    ),
    _Kind(
        _Field("event|活动", _one_of("会议 聚会 音乐会 午饭 比赛"), ()),
        (
            _Field("day|日期", _one_of("星期一 星期二 星期三 星期四 星期五 星期六"), ("在{}",)),
            _Field("time|时间", _time, ("{}开始",)),
            _Field("city|地点", city, ("在{}举行",)),
            _Field("guests|人数", _number(2, 99), ("有{}人参加",)),
        ),
    ),
    _Kind(
        _Field("name|名字", name, ()),
        (
            _Field("animal|动物", _word(ANIMALS), ("是一只{}",)),
            _Field("age|年龄", _number(1, 20), ("{}岁",)),
            _Field("color|颜色", _word(COLOURS), ("是{}的",)),
            _Field("foods|食物", _words(FOODS), ("喜欢吃{}",)),
        ),
    ),
)
_KINDS: Mapping[Language, tuple[_Kind, ...]] = {"en": _ENGLISH, "zh": _CHINESE}


def _and(items: list[str], language: Language) -> str:
    """A list as a sentence says it: "a, b and c"."""
    if language == "zh":
        return f"{'、'.join(items[:-1])}和{items[-1]}"
    return f"{', '.join(items[:-1])} and {items[-1]}"


def _clause(random: Random, field: _Field, value: Value, language: Language) -> str:
    if isinstance(value, bool):
        return field.clauses[not value]
    shown = _and(value, language) if isinstance(value, list) else str(value)
    return random.choice(field.clauses).replace("{}", shown)


def _sentence(random: Random, subject: str, clauses: list[str], language: Language) -> str:
    if language == "zh":
        return f"{subject}{'，'.join(clauses)}。"
    if len(clauses) > 1 and random.random() < 0.25:
        return " ".join(f"{subject} {clause}." for clause in clauses)
    return f"{subject} {_and(clauses, language) if len(clauses) > 1 else clauses[0]}."


def _known(random: Random, language: Language, count: int, most: int) -> list[tuple[Record, str]]:
    kind = random.choice(_KINDS[language])
    clauses = random.choice((1, 2, 2, 2, 3, 3, 4)[: 2 * most - 1])
    fields = random.sample(kind.fields, min(clauses, len(kind.fields)))
    spelled = -1 if random.random() < 0.4 else 0  # Chinese keys or English ones
    keys = [field.key.split("|")[spelled] for field in (kind.subject, *fields)]
    made = []
    for _ in range(count):
        values = [field.make(random, language) for field in (kind.subject, *fields)]
        told = [
            _clause(random, field, value, language)
            for field, value in zip(fields, values[1:], strict=True)
        ]
        subject = str(values[0])
        if language == "en" and kind.subject.key in ("product", "event"):
            subject = f"The {subject}"
        record = dict(zip(keys, values, strict=True))
        made.append((record, _sentence(random, subject, told, language)))
    return made


def _free(random: Random, language: Language, count: int, most: int) -> list[tuple[Record, str]]:
    """Fields and values that go together only by chance: nothing to learn but to copy."""
    keys = [
        invented(random) if random.random() < 0.4 else random.choice(OBJECTS["en"])
        for _ in range(random.randint(2, most))
    ]
    keys = list(dict.fromkeys(keys))
    makers = [random.choice((thing, city, name, _number(0, 999), _word(COLOURS))) for _ in keys]
    roll, made = random.random(), []
    for _ in range(count):
        values = [maker(random, language) for maker in makers]
        record: Record = dict(zip(keys, values, strict=True))
        if language == "zh":
            text = f"{'，'.join(f'{key}是{value}' for key, value in record.items())}。"
        elif roll < 0.3:
            text = "\n".join(f"{key}: {value}" for key, value in record.items())
        elif roll < 0.5:
            text = ", ".join(f"{key}: {value}" for key, value in record.items())
        else:
            told = [f"the {key} is {value}" for key, value in record.items()]
            text = capitalised(_and(told, "en") if len(told) > 1 else told[0]) + "."
        made.append((record, text))
    return made


def records(
    random: Random, language: Language, count: int, most: int = 5
) -> list[tuple[Record, str]]:
    """`count` records with the same fields in the same order, at most `most`, each with a text
    that says it."""
    make = _free if random.random() < 0.2 else _known
    return make(random, language, count, min(most, 4))
