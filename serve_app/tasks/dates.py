"""Days, months and dates: what comes before and after, and which day it is some days later.

Counting on from a weekday or a date generalises, so there the key is the day and the distance.
The days of a month are facts: there only a wording is held out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import date, timedelta
from random import Random

from rayseek.serve_app.tasks.asking import SYSTEM_PROMPTS, chat, phrase
from rayseek.serve_app.tasks.example import Answer, Chat, Judge, Language, Task
from rayseek.serve_app.tasks.judging import chooses, numbers_in, says_number, says_yes
from rayseek.serve_app.tasks.wording import Wordings, wordings_of

_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
_MONTHS = "January February March April May June July August September October November December"
DAYS: Wordings = {
    "en": tuple(_DAYS.split()),
    "zh": tuple(f"星期{sign}" for sign in "一二三四五六日"),
}
MONTHS: Wordings = {
    "en": tuple(_MONTHS.split()),
    "zh": tuple(f"{number}月" for number in range(1, 13)),
}
_WORDINGS = wordings_of(__file__)
_LENGTHS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)

# Days from today, said as a day and as a distance.
_DISTANCES: Mapping[Language, tuple[tuple[int, str, str], ...]] = {
    "en": (
        (1, "tomorrow", "the day after"),
        (1, "tomorrow", "one day after"),
        (2, "in two days", "two days after"),
        (3, "in 3 days", "3 days after"),
        (7, "in a week", "one week after"),
        (-1, "yesterday", "the day before"),
    ),
    "zh": ((1, "明天", ""), (1, "明天", ""), (2, "后天", ""), (3, "3天后", ""), (-1, "昨天", "")),
}


def _called(random: Random, language: Language, day: int) -> str:
    """A weekday as a question names it; answers have the usual name."""
    if language == "en" or random.random() < 0.7:
        return DAYS[language][day]
    return f"周{DAYS['zh'][day][-1]}" if day < 6 or random.random() < 0.5 else "星期天"


def _weekday(random: Random, language: Language) -> Chat:
    start, n = random.randrange(7), random.randint(2, 14 if random.random() < 0.8 else 30)
    back = random.random() < 0.25
    days = DAYS[language]
    right = days[(start + (-n if back else n)) % 7]
    wordings = _WORDINGS["earlier" if back else "later"][language]
    passed = [days[(start + (-i if back else i)) % 7] for i in range(1, n % 7 + 1)]
    steps = f"{n} = {n // 7} x 7 + {n % 7}: " if n > 6 else ""
    steps += ("、" if language == "zh" else ", ").join(passed)
    if language == "zh":
        answer = f"{days[start]}的{n}天{'前' if back else '后'}是{right}。"
        answer = f"{steps}。{answer}" if passed else steps + answer
    else:
        answer = f"{n} days {'before' if back else 'after'} {days[start]} is {right}."
        answer = f"{steps}. {answer}" if passed else steps + answer
    return chat(
        random,
        language,
        key=f"weekday {start}{'-' if back else '+'}{n}",
        text=phrase(random, language, wordings, day=_called(random, language, start), n=n),
        answer=answer,
        judge=_names_day(right, language),
    )


def _names_day(right: str, language: Language) -> Judge:
    if language == "en":
        return chooses(right, DAYS["en"])
    named = {"天": "日", "周": "星期", "礼拜": "星期"}

    def judge(answer: Answer) -> bool:
        text = answer.text
        for other, usual in named.items():
            text = text.replace(other, usual)
        return text.rpartition("星期")[2][:1] == right[-1]

    return judge


def _neighbour(random: Random, language: Language) -> Chat:
    """The day or the month before or after one: facts, so a pattern of wordings is in the key."""
    months, back = random.random() < 0.5, random.random() < 0.4
    names = (MONTHS if months else DAYS)[language]
    at = random.randrange(len(names))
    right = names[(at + (-1 if back else 1)) % len(names)]
    kind = "month" if months else "day"
    wordings = _WORDINGS[f"{kind}_before" if back else f"next_{kind}"][language]
    which = random.randrange(len(wordings))
    answer = f"The {kind} {'before' if back else 'after'} {names[at]} is {right}."
    if language == "zh":
        answer = f"{names[at]}的{'前' if back else '后'}一{'个月' if months else '天'}是{right}。"
    shown = names[at] if months else _called(random, language, at)
    judge = chooses(right, names) if months else _names_day(right, language)
    if months and language == "zh":
        judge = says_number(int(right[:-1]))
    return chat(
        random,
        language,
        key=f"{names[at]}{'-' if back else '+'}|{which}",
        text=phrase(random, language, wordings[which : which + 1], **{kind: shown}),
        answer=answer,
        judge=judge,
    )


def _month_length(random: Random, language: Language) -> Chat:
    month, which = random.randrange(12), random.randrange(len(_WORDINGS["length"][language]))
    name, length = MONTHS[language][month], _LENGTHS[month]
    return chat(
        random,
        language,
        key=f"length of {name}|{which}",
        text=phrase(random, language, _WORDINGS["length"][language][which : which + 1], month=name),
        answer=f"{name} has {length} days." if language == "en" else f"{name}有{length}天。",
        judge=lambda answer: length in numbers_in(answer.text),
    )


def _leap_year(random: Random, language: Language) -> Chat:
    year = random.randint(1901, 2099)
    leap = year % 4 == 0  # of these years, all that are divisible by 4
    answer = f"{'Yes' if leap else 'No'}, {year} is {'' if leap else 'not '}a leap year."
    if language == "zh":
        answer = f"{'是' if leap else '不是'}，{year}年{'是' if leap else '不是'}闰年。"
    text = phrase(random, language, _WORDINGS["leap"][language], year=year)
    return chat(
        random, language, key=f"leap {year}", text=text, answer=answer, judge=says_yes(leap)
    )


def _written(day: date, language: Language) -> tuple[str, ...]:
    """A date in the ways that people write it."""
    if language == "zh":
        return f"{day.year}年{day.month}月{day.day}日", f"{day.month}月{day.day}日", str(day)
    month = MONTHS["en"][day.month - 1]
    return str(day), f"{month} {day.day}, {day.year}", f"{day.day} {month} {day.year}"


def _day_sum(start: date, distance: int) -> str:
    """The sum that gives the day of the month: "30 + 7 - 31 = 6"."""
    sign = "+" if distance > 0 else "-"
    day = start.day + distance
    end = start + timedelta(distance)
    if end.month == start.month:
        return f"{start.day} {sign} {abs(distance)} = {day}"
    if distance > 0:
        return f"{start.day} + {distance} - {day - end.day} = {end.day}"
    return f"{start.day} - {-distance} + {end.day - day} = {end.day}"


def _date(random: Random, language: Language) -> Chat:
    start = date(random.randint(2000, 2039), 1, 1) + timedelta(random.randrange(365))
    distance, later, ago = random.choice(_DISTANCES[language])
    right = _written(start + timedelta(distance), language)
    style = random.randrange(3)
    shown = _written(start, language)[style]
    kind, system = "date", None
    if random.random() < 0.25:
        kind = "date_known"
        system = f"Today is {shown}." if language == "en" else f"今天是{shown}。"
        if random.random() < 0.5:
            system = f"{SYSTEM_PROMPTS[language][0]} {system}"
    wordings = _WORDINGS[kind][language]
    found = re.compile(rf"(?<!\d)(?:{'|'.join(map(re.escape, right))})(?!\d)")
    return chat(
        random,
        language,
        key=f"{start}{distance:+}",
        text=phrase(random, language, wordings, date=shown, later=later, after=ago),
        answer=f"{_day_sum(start, distance)}: {right[style]}",
        judge=lambda answer: found.search(answer.text) is not None,
        system=system,
    )


_MAKERS = (_weekday, _weekday, _weekday, _date, _date, _neighbour, _neighbour, _month_length)


def _about_dates(random: Random, language: Language) -> Chat:
    maker = _leap_year if random.random() < 0.08 else random.choice(_MAKERS)
    return maker(random, language)


TASKS = (Task("dates", _about_dates, 6),)
