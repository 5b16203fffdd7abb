"""Tool calls: one or several, none where none is needed or none fits, and answers to their outputs;
and conversations with several such questions.

A call is held out or not by its function and arguments, whatever it is named and however it is
asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from random import Random

from rayseek.serve_app.prompt import Message, ToolCall
from rayseek.serve_app.tasks import chat, decline, facts
from rayseek.serve_app.tasks.asking import general_system
from rayseek.serve_app.tasks.example import Chat, Judge, Language, Task, draw, is_held_out
from rayseek.serve_app.tasks.tool_offers import absent, any_spec, functions, offer, rivals
from rayseek.serve_app.tasks.tool_requests import (
    Request,
    calls_exactly,
    filled,
    reports,
    request,
    told,
)
from rayseek.serve_app.tasks.tool_specs import Declared, declared
from rayseek.serve_app.tasks.wording import spoken

# What is answered without a function, whichever there are.
_UNAIDED = (
    *chat.TASKS,
    *facts.TASKS,
    Task("decline", decline.ask_beyond_tools, weight=1),
)
_NAME, _TALK = "tools", "tooltalk"
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


def _offered(
    random: Random, language: Language, needed: Sequence[Declared], avoided: Sequence[Declared] = ()
) -> list[Declared]:
    return offer(random, language, random.choice(_NUMBER_OF_TOOLS), needed, avoided)


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
    tool = declared(random, language, any_spec(random, language))
    roll = random.random()
    if roll < 0.72:
        return [request(random, language, tool)]
    if roll < 0.87:
        while not tool.spec.many:
            tool = declared(random, language, any_spec(random, language))
        return [request(random, language, tool, random.choice((2, 2, 2, 3)))]
    other = declared(random, language, any_spec(random, language))
    while rivals(other.spec, [tool]) or other.name == tool.name:
        other = declared(random, language, any_spec(random, language))
    first, second = request(random, language, tool), request(random, language, other)
    return _joined(random, language, first, second)


def _key(requests: Sequence[Request]) -> str:
    return "+".join(sorted(entry.key for entry in requests))


def _part_keys(requests: Sequence[Request]) -> list[str]:
    return [key for entry in requests for key in entry.part_keys]


def _requests(random: Random, language: Language) -> list[Request]:
    """Requests that are held out together exactly if one of their calls is."""
    while True:
        requests = _drawn_requests(random, language)
        if _held(_part_keys(requests)) == is_held_out(_NAME, _key(requests)):
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
        functions(tools),
        language=language,
    )


def _answered(random: Random, language: Language) -> Chat:
    """Functions were called, and their outputs are to be told."""
    requests = _requests(random, language)
    messages, answer, judge = _exchange(random, language, requests)
    tools = functions(_offered(random, language, [entry.tool for entry in requests]))
    messages = (*_opening(random, language), *messages)
    return Chat(_key(requests), messages, answer, judge, tools, language=language)


def _not_needed(random: Random, language: Language) -> Chat:
    """A greeting, a question about the system or a fact, answered without the functions."""
    asked = draw(random.choice(_UNAIDED), "train", random, language)
    assert isinstance(asked, Chat)
    tools = functions(_offered(random, language, ()))
    names = ",".join(str(tool["name"]) for tool in tools)
    return replace(asked, key=f"no call|{asked.key}|{names}", tools=tools)


def _missed(random: Random, language: Language, lost: Declared) -> tuple[str, Message, Message]:
    """Key, question and answer where this function would be needed, but is not there."""
    asked = request(random, language, lost)
    question = _asked(random, language, asked.wording, asked.said)
    return (
        f"missing {asked.key}",
        question,
        Message("assistant", decline.DECLINES[language]["unable"]),
    )


def _missing(random: Random, language: Language) -> Chat:
    """A question for a function that is not among those declared."""
    lost = absent(random, language)
    key, question, answer = _missed(random, language, lost)
    tools = functions(_offered(random, language, (), [lost]))
    messages = (*_opening(random, language), question)
    return Chat(key, messages, answer, decline.declines, tools, language=language)


def make(random: Random, language: Language) -> Chat:
    """A conversation with tools."""
    roll = random.random()
    if roll < 0.12:
        return _not_needed(random, language)
    if roll < 0.30:
        return _missing(random, language)
    return _answered(random, language) if roll < 0.54 else _called(random, language)


def _wanted(random: Random, language: Language, tools: Sequence[Declared]) -> list[Request]:
    """What one question asks of functions that are there."""
    tool, other = random.choice(tools), random.choice(tools)
    roll = random.random()
    first = request(random, language, tool, 2 if roll < 0.1 and tool.spec.many else 1)
    if roll < 0.9 or other is tool:
        return [first]
    return _joined(random, language, first, request(random, language, other))


def _held(keys: Sequence[str]) -> bool:
    return any(is_held_out(_NAME, key) for key in keys)


def _earlier(random: Random, language: Language, tools: Sequence[Declared]) -> list[Message]:
    """A question and all that follows it, up to the answer; nothing in it is held out."""
    while True:
        roll = random.random()
        if roll < 0.5:
            requests = _wanted(random, language, tools)
            if not _held(_part_keys(requests)):
                messages, answer, _ = _exchange(random, language, requests)
                return [*messages, answer]
        elif roll < 0.85:
            key, question, answer = _missed(random, language, absent(random, language, tools))
            if not _held([key]):
                return [question, answer]
        else:
            asked = draw(random.choice(_UNAIDED), "train", random, language)
            assert isinstance(asked, Chat)
            return [asked.messages[-1], asked.answer]


def make_talk(random: Random, language: Language) -> Chat:
    """Questions one after the other beside the same functions; the last one counts.

    So each set of functions is met by questions that fit it and by others that do not. A talk is
    held out if its last question is one of the task of single questions.
    """
    tools = offer(random, language, random.randint(1, 3))
    before = [*_opening(random, language)]
    for _ in range(random.randint(2, 5)):
        before += _earlier(random, language, tools)
    if random.random() < 0.6:
        requests = _wanted(random, language, tools)
        keys = _part_keys(requests)
        question = _asked(random, language, requests[0].wording, requests[0].said)
        calls = _calls(requests)
        answer = Message("assistant", None, calls)
        judge = calls_exactly([(call.name, call.arguments) for call in calls])
    else:
        key, question, answer = _missed(random, language, absent(random, language, tools))
        keys, judge = [key], decline.declines
    salts = (f"{'+'.join(keys)}|{salt}" for salt in count())
    key = next(key for key in salts if is_held_out(_TALK, key) == _held(keys))
    messages = (*before, question)
    return Chat(key, messages, answer, judge, functions(tools), language=language)


TASKS = (Task(_NAME, make, weight=9), Task(_TALK, make_talk, weight=5))
