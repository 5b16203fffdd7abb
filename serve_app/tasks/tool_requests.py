"""A question that calls for a function: its words, the right calls, and how their outputs are told.

Held out is what is called: the function's key with the arguments.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from rayseek.serve_app.tasks.example import Answer, Call, Judge, Language
from rayseek.serve_app.tasks.tool_specs import Declared
from rayseek.serve_app.tasks.tool_values import KINDS, Value, sum_of
from rayseek.serve_app.tasks.wording import drawn

_SLOT = re.compile(r"\{(=?)([^{}\"]+)\}")
_AND: Mapping[Language, tuple[str, str]] = {"en": (", ", " and "), "zh": ("、", "和")}
Values = Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class Request:
    """wording: the question with its slots. said: what fills them. calls: the values of each call,
    by parameter key of the spec."""

    tool: Declared
    wording: str
    said: Mapping[str, str]
    calls: tuple[Values, ...]

    def arguments(self, values: Values) -> str:
        """The JSON text of a call's arguments."""
        shown = {self.tool.shown[key]: meant for key, (_, meant) in values.items()}
        return json.dumps(shown, ensure_ascii=False)

    @property
    def part_keys(self) -> list[str]:
        """What each call calls: function and arguments, whatever their names are here."""
        return [self._key(values) for values in self.calls]

    @property
    def key(self) -> str:
        """What all its calls call together."""
        return self._key(*self.calls)

    def _key(self, *calls: Values) -> str:
        meant = (str({key: value for key, (_, value) in values.items()}) for values in calls)
        return self.tool.spec.key + json.dumps(sorted(meant), ensure_ascii=False)


def filled(text: str, said: Mapping[str, str]) -> str:
    """A wording with its slots filled in."""
    return _SLOT.sub(lambda found: found[2] if found[1] else said[found[2]], text)


def request(random: Random, language: Language, tool: Declared, count: int = 1) -> Request:
    """A question for this function; `count` calls of it where its spec allows many."""
    spec = tool.spec
    wording = drawn(random, random.choice(spec.asks[language]))
    asked = {slot for mark, slot in _SLOT.findall(wording) if not mark}
    values: dict[str, Value] = {
        key: parameter.value(random, language)
        for key, parameter in spec.parameters.items()
        if key in asked
    }
    said = {key: value[0] for key, value in values.items()}
    if count == 1 or spec.many not in asked:
        return Request(tool, wording, said, (values,))
    several: dict[str, Value] = {}
    while len(several) < count:
        value = spec.parameters[spec.many].value(random, language)
        several[value[0]] = value
    comma, last = _AND[language]
    *first, final = several
    said[spec.many] = comma.join(first) + last + final
    return Request(
        tool, wording, said, tuple({**values, spec.many: value} for value in several.values())
    )


def told(
    random: Random, language: Language, tool: Declared, calls: Sequence[Values]
) -> list[tuple[str, str, list[str]]]:
    """For each call: the function's output, the answer to it, and the values it must contain."""
    output, answer = random.choice(tool.spec.says[language])
    results = []
    for values in calls:
        said = {key: str(meant) for key, (_, meant) in values.items()}
        slots = [slot for mark, slot in _SLOT.findall(output) if not mark and slot not in said]
        made = {
            slot: sum_of(said["expression"])
            if slot == "result"
            else KINDS[slot](random, language)[0]
            for slot in slots
        }
        results.append((filled(output, said | made), filled(answer, said | made), [*made.values()]))
    return results


def calls_exactly(expected: Sequence[tuple[str, str]]) -> Judge:
    """These functions with these arguments, in any order, and nothing else."""
    wanted = sorted(_normal(name, json.loads(arguments)) for name, arguments in expected)

    def judge(answer: Answer) -> bool:
        return sorted(_normal(call.name, call.arguments) for call in answer.calls) == wanted

    return judge


def _normal(name: Call | str, arguments: object) -> str:
    return f"{name}{json.dumps(arguments, sort_keys=True)}"


def reports(values: Sequence[str]) -> Judge:
    """The answer is a text that contains all these values; it calls nothing."""

    def judge(answer: Answer) -> bool:
        text = answer.text.replace(",", "").strip().lower()
        told = all(value.replace(",", "").lower() in text for value in values)
        return told and bool(text) and not answer.calls

    return judge
