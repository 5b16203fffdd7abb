"""The tool call parser: recorded outputs, an independent reading of whole texts, every split."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterable
from random import Random
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from rayseek.cluster.request import Request, SamplingParams
from rayseek.serve_app.answer import Answer, ChatDialect, Head
from rayseek.serve_app.detokenize import TextStream
from rayseek.serve_app.generation import Choice
from rayseek.serve_app.tokenizer import Control, Tokenizer
from rayseek.serve_app.tool_calls import (
    CallArguments,
    CallEnd,
    CallHeader,
    Event,
    ToolCallParser,
    banned_in_chat,
)

BEGIN, END, CALL, CLOSE, SEP = (
    Control.CALLS_BEGIN, Control.CALLS_END, Control.CALL_BEGIN, Control.CALL_END, Control.TOOL_SEP,
)  # fmt: skip
LETTERS = {BEGIN: "\ue000", END: "\ue001", CALL: "\ue002", CLOSE: "\ue003", SEP: "\ue004"}
Message = tuple[str, list[tuple[str, str]], str]  # content, (name, arguments) of calls, finish
FEW = hypothesis_settings(max_examples=200)


def ids_of(tokenizer: Tokenizer, parts: Iterable[Control | str | int]) -> list[int]:
    ids: list[int] = []
    for part in parts:
        if isinstance(part, int):
            ids.append(part)
        else:
            ids += tokenizer.encode_prompt((part,))
    return ids


def call(name: str, arguments: str) -> list[Control | str]:
    return [CALL, "function", SEP, f"{name}\n```json\n{arguments}\n```", CLOSE]


def events_of(tokenizer: Tokenizer, ids: Iterable[int], **options: Any) -> list[Event]:
    """What the parser tells of ids without EOS."""
    content = TextStream(tokenizer.token_bytes, hidden=tokenizer.special_ids)
    parser = ToolCallParser(tokenizer, content, **options)
    events: list[Event] = []
    for token_id in ids:
        events += parser.push(token_id)
        if parser.ended:
            return events
    return events + parser.close()


def message_of(events: Iterable[Event]) -> tuple[str, list[tuple[str, str]], int]:
    content, calls, ends = "", list[list[str]](), list[int]()
    for event in events:
        match event:
            case CallHeader(index, name):
                assert index == len(calls), "calls are numbered as they come"
                calls.append([name, ""])
            case CallArguments(index, text):
                assert index == len(calls) - 1 and index not in ends and text
                calls[index][1] += text
            case CallEnd(index):
                assert index == len(calls) - 1 and index not in ends
                ends.append(index)
            case _:
                assert event and not calls
                content += event
    return content, [(name, arguments) for name, arguments in calls], len(ends)


def test_recorded_outputs(v3: Tokenizer, vectors: dict[str, Any]) -> None:
    assert len(vectors["tool_parse"]) == 9
    for vector in vectors["tool_parse"]:
        ids, finish = vector["ids"], "length"
        if ids[-1] == v3.eos_id:
            ids, finish = ids[:-1], "stop"
        content, calls, closed = message_of(events_of(v3, ids))
        assert content == vector["content"], vector["id"]
        assert calls == [(c["name"], c["arguments"]) for c in vector["tool_calls"]], vector["id"]
        assert vector["finish_reason"] == ("tool_calls" if closed else finish), vector["id"]


BROKEN: list[tuple[list[Control | str], list[tuple[str, str]], int]] = [
    # The outer marker is missing: accepted.
    (call("f", "{}"), [("f", "{}")], 1),
    # No fence, or one without a language.
    ([BEGIN, CALL, "function", SEP, 'f\n{"a": 1}', CLOSE, END], [("f", '{"a": 1}')], 1),
    ([BEGIN, CALL, "function", SEP, "f\n```\n{}\n```", CLOSE, END], [("f", "{}")], 1),
    # A name with nothing after it; no name at all.
    ([BEGIN, CALL, "function", SEP, "f", CLOSE, END], [("f", "")], 1),
    ([BEGIN, CALL, "function", SEP, "f\n", CLOSE, END], [("f", "")], 1),
    ([BEGIN, CALL, "function", SEP, CLOSE, END], [], 0),
    ([BEGIN, CALL, "function", CLOSE, *call("g", "{}"), END], [("g", "{}")], 1),
    ([BEGIN, CALL, "function", SEP, "f", *call("g", "{}")], [("g", "{}")], 1),
    ([BEGIN, END], [], 0),
    # `call_end` is missing: the fence stands for it before `calls_end` and at the end.
    ([BEGIN, *call("f", "{}")[:-1], END], [("f", "{}")], 1),
    ([BEGIN, *call("f", "{}")[:-1]], [("f", "{}")], 1),
    # ... and the half of one does not.
    ([BEGIN, CALL, "function", SEP, "f\n```json\n{}\n``"], [("f", "{}\n``")], 0),
    # Every marker but `call_end` is text inside arguments; so are fences.
    (
        call("f", "{" + "".join(m.value for m in LETTERS) + "}"),
        [("f", "{" + "".join(m.value for m in LETTERS) + "}")],
        1,
    ),
    (
        [CALL, "function", SEP, 'f\n```json\n{"a": "', BEGIN, SEP, CALL, END, '"}\n```', CLOSE],
        [("f", '{"a": "' + BEGIN.value + SEP.value + CALL.value + END.value + '"}')],
        1,
    ),
    (call("f", '{"a": 1}\n```\n```json\n{}'), [("f", '{"a": 1}\n```\n```json\n{}')], 1),
    # Text around and after the calls is not content.
    (["", BEGIN, "so", *call("f", "{}"), "and", END, "bye"], [("f", "{}")], 1),
    # Markers that open nothing.
    ([SEP, CLOSE, END], [], 0),
]


@pytest.mark.parametrize(("parts", "calls", "closed"), BROKEN)
def test_broken_outputs(
    small: Tokenizer, v3: Tokenizer, parts: list[Any], calls: list[Any], closed: int
) -> None:
    for tokenizer in (small, v3):
        assert message_of(events_of(tokenizer, ids_of(tokenizer, parts))) == ("", calls, closed)


def test_header_comes_with_the_name_and_arguments_as_they_come(small: Tokenizer) -> None:
    content = TextStream(small.token_bytes)
    parser = ToolCallParser(small, content)
    told: dict[int, list[Event]] = {}
    ids = ids_of(small, [BEGIN, *call("get", '{"a": "é\n`x"}'), END])
    for position, token_id in enumerate(ids):
        told[position] = parser.push(token_id)
    text = "".join(
        next((c.value for c in Control if small.id_of(c) == i), small.decode([i])) for i in ids
    )
    assert len(text) > len(ids)  # é came in two halves
    name_ends = ids.index(20 + ord("\n"))
    assert told[name_ends] == [CallHeader(0, "get")]
    begin = ids.index(20 + ord("{"))
    pieces = [events for position, events in told.items() if begin <= position and events]
    # One character each, but for what could have become the closing fence.
    assert [e.text for [e] in pieces[:-1] if isinstance(e, CallArguments)] == [
        "{", '"', "a", '"', ":", " ", '"', "é", "\n`x", '"', "}",
    ]  # fmt: skip
    assert pieces[-1] == [CallEnd(0)]
    assert parser.ended and parser.closed == 1


def test_only_the_first_call_where_one_is_allowed(small: Tokenizer) -> None:
    ids = ids_of(small, [BEGIN, *call("f", "{}"), "\n", *call("g", "{}"), END])
    assert message_of(events_of(small, ids, parallel=False)) == ("", [("f", "{}")], 1)


def test_bans(v3: Tokenizer) -> None:
    plain, calling = banned_in_chat(v3, calls=False), banned_in_chat(v3, calls=True)
    assert plain == {0, *range(128800, 128805), *range(128806, 128815)}
    assert plain - calling == {*range(128806, 128810), 128814}


# ---- every split ----

GOOD = st.builds(
    lambda before, calls, between, end: [
        before,
        BEGIN,
        *(p for c in calls for p in (*c, between)),
        *end,
    ],  # fmt: skip
    st.sampled_from(["", "Let me check.", "\n\n"]),
    st.lists(
        st.builds(
            call,
            st.sampled_from(["get_weather", "f", "a-b"]),
            st.sampled_from(
                ["{}", '{"city": "北京 😊"}', '{\n  "a": 1\n}', '{"code": "```json\\n{}\\n```"}']
            ),
        ),
        max_size=3,
    ),
    st.sampled_from(["\n", ""]),
    st.sampled_from([[END, Control.EOS], [Control.EOS], [END], [], [END, "tail", Control.EOS]]),
)
CRUMB = st.sampled_from(
    [BEGIN, END, CALL, CLOSE, SEP, CLOSE, Control.EOS, Control.BOS, Control.USER, "function", "f",
     "\n", "```", "json", "```json\n", "\n```", "``", "`", " ", "{", '{"a": "é"}', "js", "\t", "x",
     "\ud7ff", 20 + 0xF0, 20 + 0x9F, 20 + 0x98, 20 + 0x80, 999]
)  # fmt: skip
ANY = st.lists(CRUMB, max_size=25)


@st.composite
def mangled(draw: st.DrawFn) -> list[Any]:
    """Good calls with some parts lost, doubled or replaced, or mere crumbs."""
    parts: list[Any] = draw(GOOD)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(parts)))
        parts[at : at + draw(st.integers(0, 1))] = draw(st.lists(CRUMB, max_size=2))
    return parts


def some(*choices: list[Any]) -> st.SearchStrategy[list[Any]]:
    return st.sampled_from(choices)


# A broken smile (three of its four bytes) and the rest of one.
SMI, LE = [20 + 0xF0, 20 + 0x9F, 20 + 0x98], [20 + 0x80]
ODD_CALL = st.tuples(
    some([CALL], [CALL, "function"], [CALL, *SMI], []),
    some([SEP], [SEP], [SEP, "g", SEP], [SEP, *SMI, SEP, *LE], [Control.BOS], []),
    some(["f"], [" f "], ["\n f\t"], [*SMI], [*SMI, *LE], ["f", Control.BOS, "f"], [SEP, "f"], []),
    some(["\n"], ["\n \n"], [*LE, "\n"], []),
    some(["```json\n"], ["```\n"], ["``` json \n"], ["```js"], ["```json"], ["``"], ["\n```"], []),
    st.lists(CRUMB, max_size=4).filter(lambda crumbs: Control.EOS not in crumbs),
    some(["\n```"], ["\n``"], [*SMI], []),
    some([CLOSE], [CLOSE, "\n", *SMI], [END], [Control.EOS], []),
).map(lambda parts: sum(parts, list[Any]()))
ODD = st.builds(
    lambda before, calls, end: sum([before, *calls, end], list[Any]()),
    some([BEGIN], [], ["a check", *SMI, BEGIN], ["x", *SMI, SEP, *LE, "\n"]),
    st.lists(ODD_CALL, min_size=1, max_size=3),
    some([END, Control.EOS], [Control.EOS], ["tail"], []),
)
TEXT = some(["a", *SMI], ["a", *SMI, *LE, *SMI, Control.EOS], ["b", SEP, *SMI, Control.EOS])
OUTPUTS = GOOD | GOOD | mangled() | mangled() | ANY | ODD | ODD | ODD | TEXT
OPTIONS = st.fixed_dictionaries(
    {
        "max_tokens": st.just(400) | st.integers(1, 120),
        "parallel": st.booleans() | st.just(True),
        "stop": st.sampled_from([(), (), (), ("check",), ("\n", "e"), ("x", "\ufffd")]),
        "logprobs": st.sampled_from([None, None, 0]),
    }
)


def expected(tokenizer: Tokenizer, ids: list[int], options: dict[str, Any]) -> Message:
    """The message, read from the whole text at once, markers as private letters."""
    finish, shown = "length", list[int]()
    for token_id in ids[: options["max_tokens"]]:
        if token_id == tokenizer.eos_id:
            finish = "stop"
            break
        if token_id not in tokenizer.special_ids:
            shown.append(token_id)
    letters = {tokenizer.id_of(control): letter for control, letter in LETTERS.items()}
    opens = (tokenizer.id_of(BEGIN), tokenizer.id_of(CALL))
    start = next((i for i, token_id in enumerate(shown) if token_id in opens), len(shown))
    content = tokenizer.decode(i for i in shown[:start] if i not in letters)
    for end in range(len(content) + 1):
        lengths = [len(s) for s in options["stop"] if content[:end].endswith(s)]
        if lengths:
            return content[: end - max(lengths)], [], "stop"
    rest, run = "", list[int]()
    for token_id in [*shown[start:], -1]:
        if token_id in letters or token_id == -1:
            rest += tokenizer.decode(run) + letters.get(token_id, "")
            run = []
        else:
            run.append(token_id)
    calls, closed, ended = read_calls(rest, options["parallel"])
    if (finish == "stop" or ended) and closed:
        finish = "tool_calls"
    return content, calls, "stop" if ended and not closed else finish


def read_calls(rest: str, parallel: bool) -> tuple[list[tuple[str, str]], int, bool]:
    """Calls, how many were closed, and whether the answer ends here."""
    begin, end, opening, close, sep = LETTERS.values()
    calls: list[tuple[str, str]] = []
    closed, state, name = 0, "between", ""
    while rest:
        letter, rest = rest[0], rest[1:]
        if letter == end:
            return calls, closed, True
        if letter in (begin, opening):
            state = "between" if letter == begin else "type"
        elif letter == sep and state != "between":
            state, name = "name", ""
        elif letter == close:
            if state == "name" and name.strip():
                calls.append((name.strip(), ""))
                closed += 1
                if not parallel:
                    return calls, closed, True
            state = "between"
        elif state == "name" and letter == "\n" and name.strip():
            inside, ending, rest = rest.partition(close)
            text = without_fence(inside)
            body, early, _ = text.partition(f"\n```{end}")
            complete = bool(early) or text.endswith("\n```")
            closed += complete or bool(ending)
            calls.append((name.strip(), as_text(body if early else text.removesuffix("\n```"))))
            if early or (ending and not parallel):
                return calls, closed, True
            state = "between"
        elif state == "name":
            name += letter
    return calls, closed, False


def without_fence(text: str) -> str:
    text = text.lstrip()
    if re.fullmatch(r"`{0,2}|```[^\S\n]*(j|js|jso|json)?[^\S\n]*", text):
        return ""
    fence = re.match(r"```[^\S\n]*(json)?[^\S\n]*\n", text)
    if fence:
        return text[fence.end() :]
    return re.sub(r"\A```(json)?\s*", "", text)


def as_text(arguments: str) -> str:
    for control, letter in LETTERS.items():
        arguments = arguments.replace(letter, control.value)
    return arguments


def streamed(document: bytes) -> tuple[Message, dict[str, Any]]:
    """A client that knows the format only; checks the shape of every chunk (spec section 5.7)."""
    frames = [json.loads(f.removeprefix("data: ")) for f in document.decode().split("\n\n")[:-2]]
    assert document.endswith(b"data: [DONE]\n\n")
    assert frames[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    content, calls, finish, entries = "", list[list[str]](), None, list[Any]()
    for frame in frames[1:]:
        [choice] = frame["choices"]
        assert finish is None, "a chunk after the last"
        finish, delta = choice["finish_reason"], choice["delta"]
        assert len(delta) == 1
        entries += (choice["logprobs"] or {}).get("content", [])
        if "content" in delta:
            assert not calls or (finish and delta["content"] == "")
            content += delta["content"]
            continue
        [part] = delta["tool_calls"]
        if part["index"] == len(calls):
            assert re.fullmatch(rf"call_{len(calls)}_[0-9a-f-]{{36}}", part.pop("id"))
            assert part.pop("type") == "function" and part["function"]["arguments"] == ""
            calls.append([part["function"].pop("name"), ""])
        assert part == {"index": len(calls) - 1, "function": part["function"]}
        assert list(part["function"]) == ["arguments"]
        calls[-1][1] += part["function"]["arguments"]
    assert isinstance(finish, str)
    rest = {"usage": frames[-1]["usage"], "logprobs": entries}
    return (content, [(name, arguments) for name, arguments in calls], finish), rest


def whole(document: dict[str, Any]) -> tuple[Message, dict[str, Any]]:
    [choice] = document["choices"]
    message = choice["message"]
    calls = message.get("tool_calls", [])
    assert "tool_calls" not in message or calls, "never an empty list"
    assert [c["index"] for c in calls] == list(range(len(calls)))
    assert (message["content"] is None) <= bool(calls) and (message["content"] != "" or not calls)
    pairs = [(c["function"]["name"], c["function"]["arguments"]) for c in calls]
    rest = {
        "usage": document["usage"],
        "logprobs": (choice["logprobs"] or {}).get("content", []),
    }
    return (message["content"] or "", pairs, choice["finish_reason"]), rest


def cuts_of(length: int, random: Random, splits: int) -> list[list[int]]:
    """One by one, eight by eight, all at once, and random ones."""
    ways = [list(range(length)), list(range(0, length, 8)), []]
    while len(ways) < splits:
        ways.append(random.sample(range(length), random.randint(0, length)) if length else [])
    return ways


def check_splits(
    api: Any, tokenizer: Tokenizer, parts: list[Any], options: dict[str, Any], random: Random,
    splits: int,
) -> int:  # fmt: skip
    """The message of every split is the one expected, streamed and whole. Returns the splits."""
    ids = ids_of(tokenizer, parts)
    sampling = SamplingParams(
        options["max_tokens"],
        stop_token_ids=(tokenizer.eos_id,),
        logprobs=options["logprobs"],
    )

    def answer(cuts: list[int]) -> Answer:
        content = TextStream(
            tokenizer.token_bytes, stop=options["stop"], hidden=tokenizer.special_ids
        )
        parser = ToolCallParser(tokenizer, content, parallel=options["parallel"])
        request = Request("r", (0,), sampling)
        choice = Choice(0, 0, request, content, frozenset({tokenizer.eos_id}), parser)
        engine = api.ScriptedEngine(lambda r: api.deltas_of(r, ids, cuts))
        logprobs = options["logprobs"] is not None
        return Answer(Head("m", "fp"), ChatDialect(tokenizer), engine, [choice], logprobs=logprobs)

    async def stream(cuts: list[int]) -> bytes:
        return b"".join([frame async for frame in answer(cuts).events()])

    async def both() -> int:
        message = expected(tokenizer, ids, options)
        plain, rest = whole(await answer([]).document())
        assert plain == message
        count = 0
        for cuts in cuts_of(min(len(ids), options["max_tokens"]), random, splits):
            assert streamed(await stream(cuts)) == (message, rest)
            count += 1
        return count

    return asyncio.run(both())


@FEW
@example(  # a stop string that only the end completes
    ["a", *SMI],
    {"max_tokens": 400, "parallel": True, "stop": ("\ufffd",), "logprobs": None},
    Random(1),
)
@example(  # bytes of no character between the closing fence and `calls_end`
    [CALL, SEP, "f\n{}\n```", *SMI, END, Control.EOS],
    {"max_tokens": 400, "parallel": True, "stop": (), "logprobs": None},
    Random(1),
)
@given(parts=OUTPUTS, options=OPTIONS, random=st.randoms(use_true_random=False))
def test_every_split_of_every_output_gives_the_same_message(
    api: Any, small: Tokenizer, parts: list[Any], options: dict[str, Any], random: Random
) -> None:
    check_splits(api, small, parts, options, random, 8)


@hypothesis_settings(FEW, max_examples=60)
@given(parts=GOOD | mangled(), options=OPTIONS, random=st.randoms(use_true_random=False))
def test_the_same_with_the_tokens_of_v3(
    api: Any, v3: Tokenizer, parts: list[Any], options: dict[str, Any], random: Random
) -> None:
    parts = [p for p in parts if not isinstance(p, int)]
    check_splits(api, v3, parts, options, random, 4)
