"""Units: small whole numbers turned into a smaller unit, and round ones into a larger.

The answer shows the multiplication, which the sums teach. The key is the pair of units and the
number.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

from rayseek.serve_app.tasks.asking import chat, phrase
from rayseek.serve_app.tasks.example import Chat, Language, Task, is_held_out
from rayseek.serve_app.tasks.judging import says_number
from rayseek.serve_app.tasks.wording import wordings_of

# A unit: its long name, its short one, and the name of exactly one.
Unit = tuple[str, str, str]
_UNITS: Mapping[str, Unit] = {
    unit.split()[0]: (unit.split()[0], unit.split()[1], unit.split()[2])
    for unit in (
        "kilometers km kilometer", "meters m meter", "centimeters cm centimeter",
        "millimeters mm millimeter", "kilograms kg kilogram", "grams g gram", "tons t ton",
        "liters l liter", "milliliters ml milliliter", "hours h hour", "minutes min minute",
        "seconds s second", "days days day", "weeks weeks week", "years years year",
        "months months month", "dozen dozen dozen", "eggs eggs egg", "dollars dollars dollar",
        "cents cents cent", "feet ft foot", "inches inches inch",
        "千米 公里 千米", "米 米 米", "厘米 厘米 厘米", "毫米 毫米 毫米", "千克 公斤 千克",
        "克 克 克", "吨 吨 吨", "升 升 升", "毫升 毫升 毫升", "小时 小时 小时",
        "分钟 分钟 分钟", "秒 秒钟 秒",
        "天 天 天", "周 星期 周", "年 年 年", "个月 个月 个月", "元 块 元", "分 分 分",
    )
}  # fmt: skip
# Larger unit, smaller unit, factor, greatest number that is asked for.
_PAIRS: Mapping[Language, tuple[tuple[str, str, int, int], ...]] = {
    "en": (
        ("kilometers", "meters", 1000, 99),
        ("meters", "centimeters", 100, 99),
        ("centimeters", "millimeters", 10, 99),
        ("kilograms", "grams", 1000, 99),
        ("tons", "kilograms", 1000, 99),
        ("liters", "milliliters", 1000, 99),
        ("dollars", "cents", 100, 99),
        ("hours", "minutes", 60, 12),
        ("minutes", "seconds", 60, 12),
        ("days", "hours", 24, 12),
        ("weeks", "days", 7, 12),
        ("years", "months", 12, 12),
        ("dozen", "eggs", 12, 12),
        ("feet", "inches", 12, 12),
    ),
    "zh": (
        ("千米", "米", 1000, 99),
        ("米", "厘米", 100, 99),
        ("厘米", "毫米", 10, 99),
        ("千克", "克", 1000, 99),
        ("吨", "千克", 1000, 99),
        ("升", "毫升", 1000, 99),
        ("元", "分", 100, 99),
        ("小时", "分钟", 60, 12),
        ("分钟", "秒", 60, 12),
        ("天", "小时", 24, 12),
        ("周", "天", 7, 12),
        ("年", "个月", 12, 12),
    ),
}
_WORDINGS = wordings_of(__file__)
_ROUND = (10, 100, 1000)  # these are asked in both directions


def _conversion(random: Random, language: Language) -> Chat:
    while True:
        larger, smaller, factor, greatest = random.choice(_PAIRS[language])
        n = random.randint(1, 12 if random.random() < 0.5 else greatest)
        if not is_held_out("arithmetic", f"{n}×{factor}"):
            break  # a product that is held out there must not be said here
    value, sign = n * factor, "×"
    source, target = _UNITS[larger], _UNITS[smaller]
    if factor in _ROUND and random.random() < 0.25:
        source, target, n, value, sign = target, source, value, n, "÷"
    short = random.random() < 0.35
    unit, to = source[short], target[short]
    asked = source[2] if n == 1 and not short else unit
    given = target[2] if value == 1 and not short else to
    space = " " if language == "en" else ""
    return chat(
        random,
        language,
        key=f"{larger}>{smaller}|{n}{sign}",
        text=phrase(random, language, _WORDINGS["conversion"][language], n=n, unit=asked, to=to),
        answer=f"{n}{space}{asked} = {n} {sign} {factor} = {value}{space}{given}",
        judge=says_number(value),
    )


TASKS = (Task("units", _conversion, 6),)
