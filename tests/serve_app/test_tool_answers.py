"""Tools through the whole API: what the openai SDK makes of it, bans, limits, counts."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from rayseek.cluster.request import Request
from rayseek.serve_app.settings import ApiSettings
from rayseek.serve_app.tokenizer import Control, Tokenizer

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
TIME = {"type": "function", "function": {"name": "get_time"}}
ASK: dict[str, Any] = {
    "model": "deepseek-v3",
    "messages": [{"role": "user", "content": "Weather in Paris?"}],
    "tools": [WEATHER, TIME],
}


@pytest.fixture
def engine(api: Any, vectors: dict[str, Any]) -> Any:
    """Plays a recorded output (T3 at first) in deltas of three tokens."""

    def script(request: Request) -> Any:
        ids = next(v["ids"] for v in vectors["tool_parse"] if v["id"] == engine.plays)
        return api.deltas_of(request, ids, range(0, 100, 3))

    engine = api.ScriptedEngine(script)
    engine.plays = "T3"
    return engine


@pytest.fixture
def sdk(api: Any, v3: Tokenizer, settings: ApiSettings, engine: Any) -> Callable[[], Any]:
    @asynccontextmanager
    async def connect() -> AsyncIterator[openai.AsyncOpenAI]:
        async with api.client_of(api.build_app(settings, v3, engine)) as http:
            yield openai.AsyncOpenAI(
                api_key=api.KEY, base_url="http://test/v1", http_client=http, max_retries=0
            )

    return connect


def pairs(message: Any) -> list[tuple[str, str]]:
    return [(c.function.name, c.function.arguments) for c in message.tool_calls or ()]


async def test_the_sdk_reads_recorded_outputs_streamed_and_whole(
    sdk: Any, engine: Any, vectors: dict[str, Any]
) -> None:
    for vector in vectors["tool_parse"]:
        engine.plays = vector["id"]
        ask = ASK
        if vector["finish_reason"] == "length":
            ask = {**ASK, "max_tokens": len(vector["ids"])}
        async with sdk() as client:
            answer = await client.chat.completions.create(**ask)
            async with client.chat.completions.stream(**ask) as stream:
                deltas = [
                    e async for e in stream if e.type == "tool_calls.function.arguments.delta"
                ]
                if vector["finish_reason"] != "length":  # which the helper raises
                    streamed = await stream.get_final_completion()
                    assert streamed.usage == answer.usage
        [choice] = answer.choices
        expected = [(c["name"], c["arguments"]) for c in vector["tool_calls"]]
        assert pairs(choice.message) == expected
        assert choice.finish_reason == vector["finish_reason"]
        assert choice.message.content == (vector["content"] or (None if expected else ""))
        for index, (_, arguments) in enumerate(expected):
            told = "".join(d.arguments_delta for d in deltas if d.index == index)
            assert told == arguments
        if vector["finish_reason"] != "length":
            assert pairs(streamed.choices[0].message) == expected
            assert streamed.choices[0].finish_reason == vector["finish_reason"]
            assert streamed.choices[0].message.content == vector["content"]
        # Markup is counted, the final EOS is not.
        assert answer.usage.completion_tokens == len([i for i in vector["ids"] if i != 1])


async def test_a_name_of_several_lines_to_some_clients_is_on_one(
    api: Any, small: Tokenizer, settings: ApiSettings
) -> None:
    begin = [Control.CALLS_BEGIN, Control.CALL_BEGIN, "function", Control.TOOL_SEP]
    ids = small.encode_prompt((*begin, "a\u2028b\n{}", Control.CALL_END, Control.CALLS_END))
    engine = api.ScriptedEngine(lambda request: api.deltas_of(request, [*ids, small.eos_id]))
    async with api.client_of(api.build_app(settings, small, engine)) as http:
        reply = await http.post("/v1/chat/completions", json={**ASK, "stream": True})
    assert "a\\u2028b" in reply.text and "\u2028" not in reply.text


async def test_round_trip_with_tool_results(
    sdk: Any, engine: Any, v3: Tokenizer, vectors: dict[str, Any]
) -> None:
    """What we answer can be sent back as it is, and reads as the model wrote it."""
    messages: list[ChatCompletionMessageParam] = list(ASK["messages"])
    async with sdk() as client:
        first = await client.chat.completions.create(**ASK)
        message = first.choices[0].message
        ids = [call.id for call in message.tool_calls]
        assert ids[0].startswith("call_0_") and ids[1].startswith("call_1_")
        messages.append(message)
        for call in reversed(message.tool_calls):  # results in any order
            messages.append(
                {"role": "tool", "tool_call_id": call.id, "content": call.function.name}
            )
        engine.plays = "T8"
        second = await client.chat.completions.create(**{**ASK, "messages": messages})
    assert second.choices[0].message.content == "Hello!"
    assert second.choices[0].message.tool_calls is None
    assert second.choices[0].finish_reason == "stop"
    before, after = (list(request.prompt_ids) for request in engine.requests)
    # The model's own tokens follow the prompt that made them: the prefix cache holds all of it.
    spoken = next(v["ids"] for v in vectors["tool_parse"] if v["id"] == "T3")
    assert after[: len(before) + len(spoken)] == before + spoken
    rest = v3.decode(after[len(before) + len(spoken) :])
    assert rest.index("get_weather") < rest.index("get_time")


@pytest.mark.parametrize(
    "ask", [{"tools": None}, {"tools": []}, {"tool_choice": "none"}], ids=json.dumps
)
async def test_no_markup_where_calls_mean_nothing(
    sdk: Any, engine: Any, v3: Tokenizer, ask: dict[str, Any]
) -> None:
    markers = {v3.id_of(c) for c in Control if c.name.startswith(("CALL", "OUTPUT", "TOOL"))}
    async with sdk() as client:
        answer = await client.chat.completions.create(**{**ASK, **ask})
        await client.chat.completions.create(
            **{**ASK, **ask, "extra_body": {"stop_token_ids": [128808]}}
        )
        await client.chat.completions.create(**ASK)
        await client.completions.create(model="deepseek-v3", prompt="Hi")
    plain, stopping, calling, raw = (set(r.sampling.banned_ids) for r in engine.requests)
    assert markers <= plain and v3.eos_id not in plain
    assert plain - stopping == {128808}
    assert markers & calling == {v3.id_of(c) for c in Control if c.name.startswith("OUTPUT")}
    assert not raw
    # This engine keeps no ban; what it says anyway is text.
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content.startswith(Control.CALLS_BEGIN.value)


async def test_one_call_without_parallel_tool_calls(sdk: Any, engine: Any) -> None:
    async with sdk() as client:
        answer = await client.chat.completions.create(**ASK, parallel_tool_calls=False)
    assert [name for name, _ in pairs(answer.choices[0].message)] == ["get_weather"]
    assert answer.choices[0].finish_reason == "tool_calls"
    assert engine.cancelled, "the engine need not go on"


async def test_stop_strings_end_content_and_leave_arguments_alone(sdk: Any, engine: Any) -> None:
    engine.plays = "T2"  # "Let me check." and a call
    async with sdk() as client:
        called = await client.chat.completions.create(**ASK, stop=["Paris", "```", "\n"])
        stopped = await client.chat.completions.create(**ASK, stop="check")
    assert pairs(called.choices[0].message) == [("get_weather", '{"city": "Paris", "unit": "c"}')]
    assert called.choices[0].finish_reason == "tool_calls"
    assert stopped.choices[0].message.content == "Let me "
    assert stopped.choices[0].message.tool_calls is None
    assert stopped.choices[0].finish_reason == "stop"


async def test_logprobs_are_of_the_content(sdk: Any, engine: Any, v3: Tokenizer) -> None:
    engine.plays = "T2"
    async with sdk() as client:
        answer = await client.chat.completions.create(**ASK, logprobs=True)
        stream = await client.chat.completions.create(**ASK, logprobs=True, stream=True)
        chunks = [chunk.choices[0].logprobs async for chunk in stream]
    entries = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries) == "Let me check."
    assert [e for chunk in chunks if chunk for e in chunk.content] == entries


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "a.b"}}]}, "tools[0].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "x" * 65}}]},
            "tools[0].function.name",
        ),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
            "tools[0].function.parameters",
        ),
        (
            {"tools": [{**TIME, "function": {"name": "f", "parameters": {"type": "array"}}}]},
            "tools[0].function.parameters",
        ),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ({"tools": [TIME, WEATHER, TIME]}, "tools[2].function.name"),
        ({"tools": [TIME] * 129}, "tools"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ],
)
async def test_tools_that_are_refused(sdk: Any, change: dict[str, Any], param: str) -> None:
    async with sdk() as client:
        with pytest.raises(openai.BadRequestError) as raised:
            await client.chat.completions.create(**{**ASK, **change})
    assert raised.value.param == param
