"""Which functions a conversation declares: the needed ones among others, in random order.

A third of them is invented. Functions that could stand in for one another are not offered together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random

from rayseek.serve_app.tasks.example import Language
from rayseek.serve_app.tasks.tool_invention import invented_spec
from rayseek.serve_app.tasks.tool_specs import SPECS, Declared, Spec, declared

_REAL = tuple(SPECS.values())
_RIVALS = (
    {"get_time", "now"},
    {"search", "get_news", "get_stock_price", "find_flights"},
    {"calculator", "convert_currency"},
    {"set_light", "set_temperature"},
    {"get_user", "send_email"},
    {"remember", "create_event", "set_timer"},
)
# What the small model answers itself, or what stands in for too much, is never missing.
_NEVER_MISSING = {"calculator", "translate", "remember"}
_INVENTED = 0.33
_MOST_TEXT = 10  # parameters, about; another function is not offered beside as many


def any_spec(random: Random, language: Language) -> Spec:
    """What a function is about, real-looking or invented."""
    if random.random() < _INVENTED:
        return invented_spec(random, language)
    return random.choice(_REAL)


def rivals(spec: Spec, others: Sequence[Declared]) -> bool:
    """Whether one of the others could stand in for such a function."""
    taken = {other.spec.key for other in others}
    return spec.key in taken or any(spec.key in group and group & taken for group in _RIVALS)


def absent(random: Random, language: Language, offered: Sequence[Declared] = ()) -> Declared:
    """A function that none of the offered ones could stand in for."""
    while True:
        spec = random.choice(_REAL)
        if spec.key not in _NEVER_MISSING and not rivals(spec, offered):
            return declared(random, language, spec)


def offer(
    random: Random,
    language: Language,
    count: int,
    needed: Sequence[Declared] = (),
    avoided: Sequence[Declared] = (),
) -> list[Declared]:
    """The needed functions among others, `count` together; fewer where they are long.

    avoided: what none of the others may stand in for.
    """
    tools = list(needed)
    while not tools or (len(tools) < count and sum(map(_size, tools)) < _MOST_TEXT):
        spec = any_spec(random, language)
        if not rivals(spec, [*tools, *avoided]):
            tool = declared(random, language, spec)
            if tool.name not in {other.name for other in tools}:
                tools.append(tool)
    random.shuffle(tools)
    return tools


def _size(tool: Declared) -> int:
    """About how much text a declaration is, in parameters."""
    return 2 + len(tool.shown)


def functions(tools: Sequence[Declared]) -> tuple[Mapping[str, object], ...]:
    """Their declarations as the API takes them."""
    return tuple(tool.function for tool in tools)
