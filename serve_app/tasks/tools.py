"""Tool calls: one or several, none where none is needed or none fits, and answers to their outputs.

One to four functions are declared, in random order, a third of them invented. A call is held out or
not by its function and arguments, whatever it is named and however it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random

from rayseek.serve_app.prompt import Message, ToolCall
from rayseek.serve_app.tasks import chat, decline, facts
from rayseek.serve_app.tasks.asking import general_system
from rayseek.serve_app.tasks.example import Chat, Judge, Language, Task, draw, is_held_out
from rayseek.serve_app.tasks.tool_invention import invented_spec
from rayseek.serve_app.tasks.tool_requests import (
    Request,
    calls_exactly,
    filled,
    reports,
    request,
    told,
)
from rayseek.serve_app.tasks.tool_specs import SPECS, Declared, Spec, declared
from rayseek.serve_app.tasks.wording import spoken

_REAL = tuple(SPECS.values())
# Functions that could stand in for one another are not offered together.
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
# What is answered without a function, whichever there are.
_UNAIDED = (
    *chat.TASKS,
    *facts.TASKS,
    Task("decline", decline.ask_beyond_tools, weight=1),
)
_NAME = "tools"
_INVENTED = 0.33
_MOST_TEXT = 10  # parameters, about; another function is not offered beside as many
_NUMBER_OF_TOOLS = (1, 1, 1, 1, 1, 2, 2, 2, 3, 4)
_JOINS: Mapping[Language, tuple[str, ...]] = {
    "en": (
        "{} and {}",
        "{}, and {}",
        "{} and also {}",
        "{}, then {}",
        "{}. Also {}",
        "{} and then {}",
    ),
    "zh": ("{}，{}", "{}，然后{}", "{}，还有{}", "{}，并且{}", "{}，另外{}"),
}


def _spec(random: Random, language: Language) -> Spec:
    if random.random() < _INVENTED:
        return invented_spec(random, language)
    return random.choice(_REAL)


def _rivals(spec: Spec, others: Sequence[Declared]) -> bool:
    taken = {other.spec.key for other in others}
    return spec.key in taken or any(spec.key in group and group & taken for group in _RIVALS)


def _offered(
    random: Random, language: Language, needed: Sequence[Declared], avoided: Sequence[Declared] = ()
) -> list[Declared]:
    """The needed functions among others, in random order; few where they are long."""
    tools = list(needed)
    count = random.choice(_NUMBER_OF_TOOLS)
    while not tools or (len(tools) < count and sum(map(_size, tools)) < _MOST_TEXT):
        spec = _spec(random, language)
        if not _rivals(spec, [*tools, *avoided]):
            tool = declared(random, language, spec)
            if tool.name not in {other.name for other in tools}:
                tools.append(tool)
    random.shuffle(tools)
    return tools


def _size(tool: Declared) -> int:
    """About how much text a declaration is, in parameters."""
    return 2 + len(tool.shown)


def _functions(tools: Sequence[Declared]) -> tuple[Mapping[str, object], ...]:
    return tuple(tool.function for tool in tools)


def _opening(random: Random, language: Language) -> tuple[Message, ...]:
    """Perhaps a system prompt."""
    system = general_system(random, language)
    return () if system is None else (Message("system", system),)


def _asked(random: Random, language: Language, wording: str, said: Mapping[str, str]) -> Message:
    end = random.choice("??.") if language == "en" else random.choice("？。")
    return Message("user", filled(spoken(random, language, wording, end, polite=0.08), said))


def _calls(requests: Sequence[Request]) -> tuple[ToolCall, ...]:
    made = [
        (entry.tool.name, entry.arguments(values)) for entry in requests for values in entry.calls
    ]
    return tuple(ToolCall(f"call_{i}", name, text) for i, (name, text) in enumerate(made))


def _joined(random: Random, language: Language, first: Request, second: Request) -> list[Request]:
    """Two requests in one sentence, which the first of them has."""
    later = second.wording
    for key in second.said:
        later = later.replace(f"{{{key}}}", f"{{{key}'}}")
    both = random.choice(_JOINS[language]).replace("{}", first.wording, 1)
    said = {**first.said, **{f"{key}'": value for key, value in second.said.items()}}
    return [replace(first, wording=both.replace("{}", later, 1), said=said), second]


def _drawn_requests(random: Random, language: Language) -> list[Request]:
    """One function asked for once, or one for several values, or two."""
    tool = declared(random, language, _spec(random, language))
    roll = random.random()
    if roll < 0.72:
        return [request(random, language, tool)]
    if roll < 0.87:
        while not tool.spec.many:
            tool = declared(random, language, _spec(random, language))
        return [request(random, language, tool, random.choice((2, 2, 2, 3)))]
    other = declared(random, language, _spec(random, language))
    while _rivals(other.spec, [tool]) or other.name == tool.name:
        other = declared(random, language, _spec(random, language))
    first, second = request(random, language, tool), request(random, language, other)
    return _joined(random, language, first, second)


def _key(requests: Sequence[Request]) -> str:
    return "+".join(sorted(entry.key for entry in requests))


def _requests(random: Random, language: Language) -> list[Request]:
    """Requests that are held out together exactly if one of their calls is."""
    while True:
        requests = _drawn_requests(random, language)
        parts = [key for entry in requests for key in entry.part_keys]
        held = any(is_held_out(_NAME, part) for part in parts)
        if held == is_held_out(_NAME, _key(requests)):
            return requests


def _exchange(
    random: Random, language: Language, requests: Sequence[Request]
) -> tuple[tuple[Message, ...], Message, Judge]:
    """The messages from the question to the functions' outputs, the answer, and its judge."""
    question = _asked(random, language, requests[0].wording, requests[0].said)
    calls = _calls(requests)
    results = [
        result for entry in requests for result in told(random, language, entry.tool, entry.calls)
    ]
    outputs = (
        Message("tool", output, tool_call_id=call.id)
        for call, (output, _, _) in zip(calls, results, strict=True)
    )
    text = ("" if language == "zh" else " ").join(answer for _, answer, _ in results)
    judge = reports([value for _, _, values in results for value in values])
    called = Message("assistant", None, calls)
    return (question, called, *outputs), Message("assistant", text), judge


def _called(random: Random, language: Language) -> Chat:
    """A question that functions are called for."""
    requests = _requests(random, language)
    question = _asked(random, language, requests[0].wording, requests[0].said)
    tools = _offered(random, language, [entry.tool for entry in requests])
    calls = _calls(requests)
    return Chat(
        _key(requests),
        (*_opening(random, language), question),
        Message("assistant", None, calls),
        calls_exactly([(call.name, call.arguments) for call in calls]),
        _functions(tools),
        language=language,
    )


def _answered(random: Random, language: Language) -> Chat:
    """Functions were called, and their outputs are to be told."""
    requests = _requests(random, language)
    messages, answer, judge = _exchange(random, language, requests)
    tools = _functions(_offered(random, language, [entry.tool for entry in requests]))
    messages = (*_opening(random, language), *messages)
    return Chat(_key(requests), messages, answer, judge, tools, language=language)


def _called_again(random: Random, language: Language) -> Chat:
    """After a first question with its answer, a second one for one of the functions."""
    requests = _requests(random, language)
    while is_held_out(_NAME, _key(requests)):
        requests = _requests(random, language)
    messages, answer, _ = _exchange(random, language, requests)
    tools = _offered(random, language, [entry.tool for entry in requests])
    second = request(random, language, random.choice(tools))
    question = _asked(random, language, second.wording, second.said)
    calls = _calls([second])
    return Chat(
        second.key,
        (*_opening(random, language), *messages, answer, question),
        Message("assistant", None, calls),
        calls_exactly([(call.name, call.arguments) for call in calls]),
        _functions(tools),
        language=language,
    )


def _not_needed(random: Random, language: Language) -> Chat:
    """A greeting, a question about the system or a fact, answered without the functions."""
    asked = draw(random.choice(_UNAIDED), "train", random, language)
    assert isinstance(asked, Chat)
    tools = _functions(_offered(random, language, ()))
    names = ",".join(str(tool["name"]) for tool in tools)
    return replace(asked, key=f"no call|{asked.key}|{names}", tools=tools)


def _missing(random: Random, language: Language) -> Chat:
    """A question for a function that is not among those declared."""
    spec = random.choice(_REAL)
    while spec.key in _NEVER_MISSING:
        spec = random.choice(_REAL)
    absent = declared(random, language, spec)
    asked = request(random, language, absent)
    tools = _functions(_offered(random, language, (), [absent]))
    messages = (
        *_opening(random, language), _asked(random, language, asked.wording, asked.said)
    )  # fmt: skip
    answer = Message("assistant", decline.DECLINES[language]["unable"])
    return Chat(
        f"missing {asked.key}", messages, answer, decline.declines, tools, language=language
    )


def make(random: Random, language: Language) -> Chat:
    """A conversation with tools."""
    roll = random.random()
    if roll < 0.12:
        return _not_needed(random, language)
    if roll < 0.30:
        return _missing(random, language)
    if roll < 0.36:
        return _called_again(random, language)
    return _answered(random, language) if roll < 0.58 else _called(random, language)


TASKS = (Task(_NAME, make, weight=9),)
