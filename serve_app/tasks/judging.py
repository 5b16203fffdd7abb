"""Judges: whether a text says the right thing, in whatever words it says it.

They read an answer as a person would who looks only for the result: its last number, the last
items that it lists, the text in quotes or after the colon.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence

from rayseek.serve_app.tasks.example import Answer, Judge, Language

_NUMBER = re.compile(r"(?<!\d)(?<!\d )[-−]?\d+(?:,\d{3}(?!\d))*(?:\.\d+)?")
_NUMBERED_LINE = re.compile(r"(?m)^\s*\d+[.)]\s+(?=\S)")
_FENCE = re.compile(r"```[A-Za-z]*\n(.*?)```", re.DOTALL)
_QUOTED = re.compile(r"\*\*(.+?)\*\*|`([^`\n]+)`|\"([^\"\n]+)\"|“([^”]+)”|「([^」]+)」")
_ENGLISH = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty"
)
_CHINESE = "零 一 二 三 四 五 六 七 八 九 十 十一 十二 十三 十四 十五 十六 十七 十八 十九 二十"
NUMBER_WORDS: Mapping[Language, Sequence[str]] = {
    "en": tuple(_ENGLISH.split()),
    "zh": tuple(_CHINESE.split()),
}
_VALUES = {word: value for words in NUMBER_WORDS.values() for value, word in enumerate(words)}
_VALUES["两"] = 2
_YES_OR_NO = re.compile(r"(?P<no>no\b|不|没)|yes\b|[是在有对]")
_NUMBER_WORD = re.compile(rf"\b(?:{'|'.join(NUMBER_WORDS['en'])})\b|[零两一二三四五六七八九十]+")


def numbers_in(text: str) -> list[float]:
    """All numbers in digits, in order; a minus between two numbers is no sign."""
    found = _NUMBER.findall(text)
    return [float(number.replace(",", "").replace("−", "-")) for number in found]


def _last_number(text: str) -> float | None:
    found = numbers_in(text)
    if found:
        return found[-1]
    words = _NUMBER_WORD.findall(text.lower())
    return _VALUES.get(words[-1]) if words else None


def says_number(value: float) -> Judge:
    """The last number of the answer is this one; a word will do where there are no digits."""
    return lambda answer: _last_number(answer.text) == value


def lists_numbers(values: Sequence[int]) -> Judge:
    """The answer ends with these numbers in this order (words may follow)."""

    def judge(answer: Answer) -> bool:
        bare = _NUMBERED_LINE.sub("", answer.text)
        return any(numbers_in(text)[-len(values) :] == list(values) for text in (bare, answer.text))

    return judge


def _mentions(text: str, items: Iterable[str]) -> list[str]:
    """The items named in the text, in order; the longer of two that overlap."""
    options = sorted(set(items), key=len, reverse=True)
    pattern = "|".join(
        rf"(?<![A-Za-z]){re.escape(item)}(?![A-Za-z])" if item.isascii() else re.escape(item)
        for item in options
    )
    return re.findall(pattern, text)


def lists_words(words: Sequence[str]) -> Judge:
    """The last of these words that the answer names are these, in this order."""
    return lambda answer: _mentions(answer.text, words)[-len(words) :] == list(words)


def chooses(right: str, among: Iterable[str]) -> Judge:
    """Of all the options, the one that the answer names last is the right one."""
    options = {right, *among}

    def judge(answer: Answer) -> bool:
        named = _mentions(answer.text, options)
        return bool(named) and named[-1] == right

    return judge


def says_yes(right: bool) -> Judge:
    """The answer begins with yes or no (是, 在, 有 or 不, 没), as is right."""

    def judge(answer: Answer) -> bool:
        start = _YES_OR_NO.match(answer.text.strip().lower())
        return start is not None and (start["no"] is None) == right

    return judge


def _plain(text: str) -> str:
    return text.strip().strip("\"'`*“”「」").rstrip(".。!！").strip("\"'`*“”「」 ")


def says_text(right: str) -> Judge:
    """The answer is this text, or says it last: in quotes, bold, after a colon, on a line."""
    wanted = _plain(right)

    def judge(answer: Answer) -> bool:
        text = answer.text.strip()
        if not text:
            return False
        quoted = ["".join(groups) for groups in _QUOTED.findall(text)]
        line = text.splitlines()[-1]
        after = [re.split(r"[:：]\s*", part)[-1] for part in (text, line)]
        after += [re.split(r" is |是|为", line)[-1]]
        return wanted in (_plain(part) for part in (text, line, *after, *quoted[-1:]))

    return judge


def unfenced(text: str) -> str:
    """What stands in the last Markdown code fence, or the text where there is none."""
    blocks = _FENCE.findall(text)
    return blocks[-1] if blocks else text


def says_json(value: object) -> Judge:
    """The answer, in a code fence or bare, parses as JSON and equals the value (1 is not true)."""
    wanted = json.dumps(value, sort_keys=True)

    def judge(answer: Answer) -> bool:
        try:
            return json.dumps(json.loads(unfenced(answer.text)), sort_keys=True) == wanted
        except ValueError:
            return False

    return judge
