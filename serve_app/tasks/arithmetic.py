"""Sums: + and - of numbers up to 99, and the small multiplication table.

The answer says the sum before its result, so that the digits stand side by side however the
question was worded. The key is the sum itself.
"""

from __future__ import annotations

from random import Random

from rayseek.serve_app.tasks.asking import chat, phrase
from rayseek.serve_app.tasks.example import Chat, Language, Task
from rayseek.serve_app.tasks.judging import NUMBER_WORDS, says_number
from rayseek.serve_app.tasks.wording import Wordings, wordings_of
from rayseek.serve_app.tasks.words import NAMES

_WORDINGS = wordings_of(__file__)
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
        text = phrase(random, language, _WORDINGS[f"stories {sign}"][language], **shown)
    elif roll < 0.45:
        if max(a, b) <= _WORDS_UP_TO and random.random() < 0.4:
            shown = {"a": NUMBER_WORDS[language][a], "b": NUMBER_WORDS[language][b]}
        text = phrase(random, language, _WORDINGS[f"named {sign}"][language], **shown)
    else:
        shown["sign"] = random.choice("**×x") if sign == "×" else sign
        text = phrase(random, language, _WORDINGS["signs"][language], **shown)
    return chat(
        random,
        language,
        key=f"{a}{sign}{b}",
        text=text,
        answer=f"{a} {sign} {b} = {value}",
        judge=says_number(value),
    )


TASKS = (Task("arithmetic", _sum, 24),)
