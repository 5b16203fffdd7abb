"""Anthropic's Messages API with Anthropic's own client, over a scripted engine."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st

from rayseek.cluster.request import Request
from rayseek.serve_app.keys import add_key
from rayseek.serve_app.messages import _arguments
from rayseek.serve_app.settings import ApiSettings
from rayseek.serve_app.tokenizer import Control, Tokenizer

URL = "/v1/messages"
HI: list[Any] = [{"role": "user", "content": "Hi"}]
BODY: dict[str, Any] = {"model": "deepseek-v3", "max_tokens": 99, "messages": HI}
WEATHER: Any = {
    "name": "get_weather",
    "description": "Weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
TEXT = "Hello, wörld!\u2028 😀"


def calling(tokenizer: Tokenizer, *calls: tuple[str, str], before: str = "") -> list[int]:
    ids = [*tokenizer.encode_text(before), tokenizer.id_of(Control.CALLS_BEGIN)]
    for index, (name, arguments) in enumerate(calls):
        ids += tokenizer.encode_text("\n") if index else []
        ids += [tokenizer.id_of(Control.CALL_BEGIN), *tokenizer.encode_text("function")]
        ids += [tokenizer.id_of(Control.TOOL_SEP)]
        ids += tokenizer.encode_text(f"{name}\n```json\n{arguments}\n```")
        ids += [tokenizer.id_of(Control.CALL_END)]
    return [*ids, tokenizer.id_of(Control.CALLS_END), tokenizer.eos_id]


@pytest.fixture
async def talk(api: Any, small: Tokenizer, settings: ApiSettings) -> AsyncIterator[Any]:
    """(client, engine): the engine says TEXT, or what its `script` is set to."""
    engine = api.saying(small, TEXT, cached=3)
    app = api.build_app(settings, small, engine)
    transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
    async with (
        httpx2.AsyncClient(transport=transport) as http,
        anthropic.AsyncAnthropic(
            api_key=api.KEY, base_url="http://test", http_client=http, max_retries=0
        ) as client,
    ):
        yield client, engine


async def test_plain(talk: Any, small: Tokenizer) -> None:
    client, engine = talk
    message = await client.messages.create(**BODY, system="Be brief", stop_sequences=["wo"])
    (block,) = message.content
    assert block.type == "text" and block.text == TEXT
    assert (message.role, message.type, message.model) == ("assistant", "message", "deepseek-v3")
    assert message.stop_reason == "end_turn" and message.stop_sequence is None
    usage = message.usage
    assert usage.cache_read_input_tokens == 3 and usage.cache_creation_input_tokens == 0
    request: Request = engine.requests[0]
    assert usage.input_tokens + 3 == len(request.prompt_ids)
    assert usage.output_tokens == len(small.encode_text(TEXT))
    shown = small.decode(request.prompt_ids)
    assert "Be brief" in shown and shown.endswith("Hi<｜Assistant｜>")
    counted = await client.messages.count_tokens(
        model="deepseek-v3", messages=HI, system="Be brief"
    )
    assert counted.input_tokens == len(request.prompt_ids) and len(engine.requests) == 1


async def test_a_stream_is_the_whole_message_in_pieces(talk: Any, small: Tokenizer) -> None:
    client, engine = talk
    whole = await client.messages.create(**BODY)
    async with client.messages.stream(**BODY) as stream:
        events = [event async for event in stream]
        final = await stream.get_final_message()
    assert [b.text for b in final.content] == [b.text for b in whole.content] == [TEXT]
    assert final.usage == whole.usage
    assert final.stop_reason == whole.stop_reason == "end_turn"
    kinds = [event.type for event in events if event.type != "text"]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    raw = await client.post(URL, body={**BODY, "stream": True}, cast_to=httpx2.Response)
    assert "\u2028" not in raw.text and "[DONE]" not in raw.text
    for block in raw.text.strip().split("\n\n"):
        first, second = block.split("\n")
        assert first == f"event: {json.loads(second.removeprefix('data: '))['type']}"


@pytest.mark.parametrize("stream", [False, True])
async def test_why_it_ended(talk: Any, stream: bool) -> None:
    client, _ = talk

    async def ask(**fields: Any) -> Any:
        if not stream:
            return await client.messages.create(**{**BODY, **fields})
        async with client.messages.stream(**{**BODY, **fields}) as events:
            return await events.get_final_message()

    stopped = await ask(stop_sequences=["zzz", ", w"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", ", w")
    assert stopped.content[0].text == "Hello"
    cut = await ask(max_tokens=2)
    assert cut.stop_reason == "max_tokens" and cut.content[0].text == "He"
    assert cut.usage.output_tokens == 2
    nothing = await ask(stop_sequences=["H"])
    assert nothing.content == [] and nothing.stop_sequence == "H"


async def test_tools_there_and_back(api: Any, talk: Any, small: Tokenizer) -> None:
    client, engine = talk
    calls = (("get_weather", '{"city": "北京 😊"}'), ("get_weather", "{}"))
    ids = calling(small, *calls, before="Let me see.")
    engine.script = lambda r: api.deltas_of(r, ids, range(1000))
    asked = {**BODY, "max_tokens": 2000, "tools": [WEATHER], "tool_choice": {"type": "auto"}}
    whole = await client.messages.create(**asked)
    async with client.messages.stream(**asked) as stream:
        streamed = await stream.get_final_message()
    for message in (whole, streamed):
        text, first, second = message.content
        assert text.text == "Let me see." and message.stop_reason == "tool_use"
        assert (first.type, first.name, first.input) == (
            "tool_use", "get_weather", {"city": "北京 😊"},
        )  # fmt: skip
        assert second.input == {} and first.id != second.id
    engine.script = lambda r: api.deltas_of(r, [*small.encode_text("Sunny."), small.eos_id])
    blocks = [block.model_dump(exclude_none=True) for block in whole.content]
    results = [
        {"type": "tool_result", "tool_use_id": whole.content[2].id, "content": "rain"},
        {"type": "tool_result", "tool_use_id": whole.content[1].id,
         "content": [{"type": "text", "text": "sun"}]},
        {"type": "text", "text": "And?"},
    ]  # fmt: skip
    history = [
        *HI, {"role": "assistant", "content": blocks}, {"role": "user", "content": results},
    ]  # fmt: skip
    answer = await client.messages.create(**{**asked, "messages": history})
    assert answer.content[0].text == "Sunny." and answer.stop_reason == "end_turn"
    shown = small.decode(engine.requests[-1].prompt_ids)
    assert "get_weather" in shown and '{"city": "北京 😊"}' in shown and "And?" in shown
    assert shown.index("sun<") < shown.index("rain<")  # in the order of the calls


async def test_cut_arguments_are_what_there_is(api: Any, talk: Any, small: Tokenizer) -> None:
    client, engine = talk
    ids = calling(small, ("f", '{"a": [1, 2, {"b": "xyz"}], "c": 5}'))
    engine.script = lambda r: api.deltas_of(r, ids, range(1000))
    length = ids.index(*small.encode_text("z"))
    asked = {**BODY, "tools": [{**WEATHER, "name": "f"}], "max_tokens": length}
    whole = await client.messages.create(**asked)
    async with client.messages.stream(**asked) as stream:
        streamed = await stream.get_final_message()
    assert whole.stop_reason == streamed.stop_reason == "max_tokens"
    assert whole.content[0].input == streamed.content[0].input == {"a": [1, 2, {}]}


@given(st.text(max_size=40))
def test_any_arguments_become_an_object(text: str) -> None:
    assert isinstance(_arguments(text), dict)
    assert _arguments(json.dumps({"k": text})) == {"k": text}


async def test_the_answer_goes_on_from_a_last_assistant_turn(talk: Any, small: Tokenizer) -> None:
    client, engine = talk
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "Once"},
    ]
    await client.messages.create(**{**BODY, "messages": turns})
    shown = small.decode(engine.requests[0].prompt_ids)
    assert shown.endswith("a\nb<｜Assistant｜>Once")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"stop_sequences": [""]}, "stop"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "text"),
        ({"messages": [{"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "no", "content": "x"}]}]}, "tool"),
        ({"messages": [{"role": "assistant", "content": [
            {"type": "tool_result", "tool_use_id": "no"}]}]}, "role user"),
        ({"messages": [{"role": "user", "content": [
            {"type": "tool_use", "id": "x", "name": "f", "input": {}}]}]}, "role assistant"),
        ({"tools": [{"name": "bad name", "input_schema": {}}]}, "name"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "type"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "no"}}, "tool_choice"),
        ({"system": 5}, "system"),
    ],
)  # fmt: skip
async def test_bad_requests(talk: Any, fields: dict[str, Any], said: str) -> None:
    client, engine = talk
    with pytest.raises(anthropic.BadRequestError, match=said) as raised:
        await client.post(URL, body={**BODY, **fields}, cast_to=httpx2.Response)
    body: Any = raised.value.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert not engine.requests


async def test_other_errors(
    api: Any, talk: Any, small: Tokenizer, settings: ApiSettings, tmp_path: Path
) -> None:
    client, engine = talk
    with pytest.raises(anthropic.NotFoundError, match="claude") as missing:
        await client.messages.create(**{**BODY, "model": "claude-sonnet"})
    assert missing.value.body["error"]["type"] == "not_found_error"
    engine.script = lambda r: [ValueError("x")]
    with pytest.raises(anthropic.InternalServerError, match="api_error"):
        await client.messages.create(**BODY)
    engine.script = lambda r: [
        *api.deltas_of(r, small.encode_text("abc"), [1, 2])[:-1],
        ValueError("x"),
    ]
    with pytest.raises(anthropic.APIStatusError, match="api_error"):
        async with client.messages.stream(**BODY) as stream:
            await stream.get_final_message()

    one = add_key(tmp_path / "keys.yaml", "one", requests_per_minute=1)
    alone = add_key(tmp_path / "keys.yaml", "alone", concurrent=1)
    app = api.build_app(
        replace(settings, key_file=tmp_path / "keys.yaml"), small, api.saying(small)
    )
    async with api.client_of(app, key=None) as http:
        for headers in ({"x-api-key": "no"}, {}, {"authorization": "Bearer no"}):
            reply = await http.post(URL, json=BODY, headers=headers)
            assert reply.status_code == 401
            assert reply.json()["error"]["type"] == "authentication_error"
        for root in ("/anthropic/v1", "/v1"):
            reply = await http.post(f"{root}/messages", json=BODY, headers={"x-api-key": one})
            expected = 200 if root != "/v1" else 429
            assert reply.status_code == expected, reply.text
        assert int(reply.headers["retry-after"]) > 50
        bearer = {"authorization": f"Bearer {one}"}
        assert (await http.post(URL, json=BODY, headers=bearer)).status_code == 429
        counted = {key: BODY[key] for key in ("model", "messages")}
        count = f"{URL}/count_tokens"
        assert (await http.post(count, json=counted, headers=bearer)).status_code == 429
        for _ in range(2):  # its place is given back
            reply = await http.post(count, json=counted, headers={"x-api-key": alone})
            assert reply.json()["input_tokens"] > 1


async def test_pings_while_nothing_comes(api: Any, small: Tokenizer, settings: ApiSettings) -> None:
    ids = [*small.encode_text("Yes"), small.eos_id]

    def slow(request: Request) -> list[Any]:
        first, *rest = api.deltas_of(request, ids, [1])
        return [0.1, first, 0.1, *rest]

    app = api.build_app(replace(settings, keep_alive_s=0.02), small, api.ScriptedEngine(slow))
    transport = httpx2.ASGITransport(app=app)
    async with (
        httpx2.AsyncClient(transport=transport) as http,
        anthropic.AsyncAnthropic(auth_token=api.KEY, base_url="http://test", http_client=http) as c,
    ):
        raw = await c.post(URL, body={**BODY, "stream": True}, cast_to=httpx2.Response)
        start = raw.text.index("message_start")
        assert raw.text.index("event: ping") < start < raw.text.rindex("event: ping")
        async with c.messages.stream(**BODY) as stream:
            assert await stream.get_final_text() == "Yes"
        assert (await c.messages.create(**BODY)).content[0].text == "Yes"  # after blank lines


def test_the_blocking_client(api: Any, small: Tokenizer, settings: ApiSettings) -> None:
    """Over a real socket, with a base URL as DeepSeek documents it."""
    listener = socket.create_server(("127.0.0.1", 0))
    app = api.build_app(settings, small, api.saying(small, TEXT))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/anthropic"
    try:
        with anthropic.Anthropic(api_key=api.KEY, base_url=url) as client:
            assert client.messages.create(**BODY).content[0].text == TEXT
            with client.messages.stream(**BODY) as stream:
                assert "".join(stream.text_stream) == TEXT
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
