"""Sums: + and - of numbers up to 99, and the small multiplication table.

The answer says the sum before its result, so that the digits stand side by side however the
question was worded. The key is the sum itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

from rayseek.serve_app.tasks.asking import chat, phrase
from rayseek.serve_app.tasks.example import Chat, Language, Task
from rayseek.serve_app.tasks.judging import NUMBER_WORDS, says_number
from rayseek.serve_app.tasks.words import NAMES

Wordings = Mapping[Language, tuple[str, ...]]
_SIGNS: Wordings = {
    "en": (
        "{a}( | ){sign}( | ){b}( =|=|)?",
        "{a}{sign}{b}(=| =|)?",
        "{a} {sign} {b}",
        "(what is|what's|how much is|what is the result of) {a}( {sign} |{sign}){b}?",
        "(what is|what's|whats) {a} {sign} {b}?",
        "(calculate|compute|work out|solve|evaluate)(|:) {a}( {sign} |{sign}){b}.",
        "what does {a} {sign} {b} (equal|make|give)?",
        "(do you know|can you calculate) {a} {sign} {b}?",
    ),
    "zh": (
        "{a}{sign}{b}(=|)?",
        "{a} {sign} {b}( =|)?",
        "{a}{sign}{b}",
        "{a}( {sign} |{sign}|{sign}){b}(等于多少|等于几|是多少|的结果是多少|得多少)？",
        "(计算|算一下|算算|求)(|：){a}( {sign} |{sign}){b}。",
    ),
}
_NAMED: Mapping[Language, Mapping[str, tuple[str, ...]]] = {
    "en": {
        "+": (
            "(what is|what's|how much is|calculate) {a} (plus|plus|and|added to) {b}?",
            "add {a} and {b}.",
            "what is the sum of {a} and {b}?",
            "{a} plus {b}",
        ),
        "-": (
            "(what is|what's|how much is|calculate) {a} (minus|minus|less|take away) {b}?",
            "subtract {b} from {a}.",
            "take {b} away from {a}.",
            "{a} minus {b}",
        ),
        "×": (
            "(what is|what's|how much is) {a} (times|times|multiplied by) {b}?",
            "multiply {a} by {b}.",
            "what is the product of {a} and {b}?",
            "{a} times {b}",
        ),
    },
    "zh": {
        "+": ("{a}(加|加|加上){b}(等于多少|等于几|是多少|得几)？", "{a}与{b}的和是多少？"),
        "-": ("{a}(减|减|减去){b}(等于多少|等于几|是多少|得几)？", "{a}与{b}的差是多少？"),
        "×": ("{a}(乘|乘以|乘以){b}(等于多少|等于几|是多少|得几)？", "{a}与{b}的积是多少？"),
    },
}
_STORIES: Mapping[Language, Mapping[str, tuple[str, ...]]] = {
    "en": {
        "+": (
            "{who} has {a} {thing} and (buys|gets|finds) {b} more. How many {thing} does {who} "
            "have (now|in total)?",
            "there are {a} {thing} on the table and {b} in the box. How many (are there|is that) "
            "(in total|together)?",
        ),
        "-": (
            "{who} has {a} {thing} and (gives away|eats|loses) {b}. How many (are left|remain)?",
            "there are {a} {thing} in the box. {who} takes {b} of them. How many are left?",
        ),
        "×": (
            "{who} has {a} boxes with {b} {thing} (each|in each box). How many {thing} is that?",
            "there are {a} bags with {b} {thing} in each. How many {thing} are there?",
        ),
    },
    "zh": {
        "+": (
            "{who}有{a}个{thing}，又买了{b}个，现在一共有(多少|几)个？",
            "桌子上有{a}个{thing}，盒子里有{b}个，一共有(多少|几)个？",
        ),
        "-": (
            "{who}有{a}个{thing}，吃了{b}个，还(有|剩)(多少|几)个？",
            "盒子里有{a}个{thing}，拿走{b}个，还剩(多少|几)个？",
        ),
        "×": ("有{a}个盒子，每个盒子里有{b}个{thing}，一共有多少个？",),
    },
}
_FRUIT: Wordings = {
    "en": ("apples", "pears", "eggs", "cherries", "oranges", "lemons", "bananas", "cakes"),
    "zh": ("苹果", "香蕉", "橙子", "草莓", "鸡蛋", "蛋糕"),
}
_WORDS_UP_TO = 20


def _operands(random: Random) -> tuple[int, str, int]:
    roll = random.random()
    if roll < 0.16:
        if random.random() < 0.2:
            return random.randint(2, 12), "×", random.choice((20, 24, 30, 50, 60, 100))
        return random.randint(0, 12), "×", random.randint(0, 12)
    a, b = random.randint(0, 99), random.randint(0, 99)
    if roll < 0.58:
        return a, "+", b
    return (a, "-", b) if a >= b or roll > 0.94 else (b, "-", a)


def _sum(random: Random, language: Language) -> Chat:
    a, sign, b = _operands(random)
    value = a + b if sign == "+" else a - b if sign == "-" else a * b
    shown: dict[str, object] = {"a": a, "b": b}
    roll = random.random()
    if roll < 0.12 and value >= 0:
        shown |= {"who": random.choice(NAMES[language]), "thing": random.choice(_FRUIT[language])}
        text = phrase(random, language, _STORIES[language][sign], **shown)
    elif roll < 0.45:
        if max(a, b) <= _WORDS_UP_TO and random.random() < 0.4:
            shown = {"a": NUMBER_WORDS[language][a], "b": NUMBER_WORDS[language][b]}
        text = phrase(random, language, _NAMED[language][sign], **shown)
    else:
        shown["sign"] = random.choice("**×x") if sign == "×" else sign
        text = phrase(random, language, _SIGNS[language], **shown)
    return chat(
        random,
        language,
        key=f"{a}{sign}{b}",
        text=text,
        answer=f"{a} {sign} {b} = {value}",
        judge=says_number(value),
    )


TASKS = (Task("arithmetic", _sum, 24),)
