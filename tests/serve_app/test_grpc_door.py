"""The gRPC door over real gRPC on loopback, without Serve: same answers as over HTTP."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from rayseek.serve_app.chat_pb2 import ChatChunk, ChatReply, ChatRequest, Message, ToolCall
from rayseek.serve_app.grpc_door import SERVICE, GrpcDoor, add_chat_to_server, body_of
from rayseek.serve_app.keys import add_key
from rayseek.serve_app.protocol import ChatRequest as ChatBody
from rayseek.serve_app.service import Service
from rayseek.serve_app.settings import ApiSettings
from rayseek.serve_app.tokenizer import Control, Tokenizer

TEXT = "Hello, wörld! 😀"
HI = ChatRequest(model="deepseek-v3", messages=[Message(role="user", content="Hi")])
TOOLS = json.dumps([{"type": "function", "function": {"name": "f", "parameters": {}}}])


class Client:
    def __init__(self, channel: Any, key: str) -> None:
        self._metadata = (("authorization", f"Bearer {key}"),)
        self._chat = channel.unary_unary(
            f"/{SERVICE}/Chat", ChatRequest.SerializeToString, ChatReply.FromString
        )
        self._stream = channel.unary_stream(
            f"/{SERVICE}/ChatStream", ChatRequest.SerializeToString, ChatChunk.FromString
        )

    async def chat(self, request: ChatRequest) -> ChatReply:
        return await self._chat(request, metadata=self._metadata, timeout=120)

    def stream(self, request: ChatRequest) -> Any:
        return self._stream(request, metadata=self._metadata, timeout=120)


@pytest.fixture
async def door(
    api: Any, small: Tokenizer, settings: ApiSettings, tmp_path: Path
) -> AsyncIterator[Any]:
    """(client of a key, engine, door)."""
    engine = api.saying(small, TEXT, cached=2)
    file = tmp_path / "keys.yaml"
    one = add_key(file, "one", requests_per_minute=1)
    opened = GrpcDoor()
    opened._service = Service(replace(settings, key_file=file), small, engine)
    server = grpc.aio.server()
    add_chat_to_server(opened, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        clients = {"good": Client(channel, api.KEY), "one": Client(channel, one)}
        clients["bad"] = Client(channel, "sk-no")
        yield clients, engine, opened
    await server.stop(None)


def changed(**fields: Any) -> ChatRequest:
    request = ChatRequest()
    request.CopyFrom(HI)
    request.MergeFrom(ChatRequest(**fields))
    return request


async def test_whole_and_streamed(door: Any, small: Tokenizer) -> None:
    clients, engine, _ = door
    whole = await clients["good"].chat(HI)
    chunks = [chunk async for chunk in clients["good"].stream(HI)]
    assert whole.content == "".join(chunk.content for chunk in chunks) == TEXT
    assert whole.finish_reason == chunks[-1].finish_reason == "stop"
    assert whole.usage == chunks[-1].usage
    assert [chunk.HasField("usage") for chunk in chunks[:-1]] == [False] * (len(chunks) - 1)
    assert whole.usage.prompt_tokens == len(engine.requests[0].prompt_ids)
    assert whole.usage.completion_tokens == len(small.encode_text(TEXT))
    assert whole.usage.prompt_cache_hit_tokens == 2
    assert whole.id and whole.model == "deepseek-v3" and len(chunks) > 5


async def test_tools(api: Any, door: Any, small: Tokenizer) -> None:
    clients, engine, _ = door
    ids = [*small.encode_text("Well."), small.id_of(Control.CALLS_BEGIN)]
    ids += [small.id_of(Control.CALL_BEGIN), *small.encode_text("function")]
    ids += [small.id_of(Control.TOOL_SEP), *small.encode_text('f\n```json\n{"a": "é"}\n```')]
    ids += [small.id_of(Control.CALL_END), small.id_of(Control.CALLS_END), small.eos_id]
    engine.script = lambda r: api.deltas_of(r, ids, range(999))
    request = changed(tools_json=TOOLS, tool_choice_json='"auto"')
    whole = await clients["good"].chat(request)
    (call,) = whole.tool_calls
    assert (call.name, call.arguments, whole.content) == ("f", '{"a": "é"}', "Well.")
    assert whole.finish_reason == "tool_calls" and call.id
    pieces = [p async for c in clients["good"].stream(request) for p in c.tool_calls]
    assert pieces[0].name == "f" and pieces[0].id and not any(p.name for p in pieces[1:])
    assert "".join(p.arguments for p in pieces) == call.arguments
    back = changed(tools_json=TOOLS)
    back.messages.add(role="assistant", tool_calls=[call])
    back.messages.add(role="tool", tool_call_id=call.id, content="done")
    await clients["good"].chat(back)
    assert "done" in small.decode(engine.requests[-1].prompt_ids)


def test_every_field_arrives() -> None:
    request = changed(
        temperature=0.0, top_p=0.5, max_tokens=7, stop=["a", "b"], seed=-5,
        frequency_penalty=0.0, presence_penalty=-1.0, tools_json=TOOLS,
        tool_choice_json='{"type": "function"}', more_json='{"top_k": 4, "model": "no"}',
        messages=[
            Message(role="assistant", tool_calls=[ToolCall(id="x", name="f", arguments="{}")]),
            Message(role="assistant", content="", prefix=True),
        ],
    )  # fmt: skip
    assert body_of(request) == {
        "model": "deepseek-v3", "temperature": 0.0, "top_p": 0.5, "max_tokens": 7,
        "stop": ["a", "b"], "seed": -5, "frequency_penalty": 0.0, "presence_penalty": -1.0,
        "tools": json.loads(TOOLS), "tool_choice": {"type": "function"}, "top_k": 4,
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant",
             "tool_calls": [{"id": "x", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "assistant", "content": "", "prefix": True},
        ],
    }  # fmt: skip
    assert set(body_of(HI)) == {"model", "messages"}
    fields = {name for name in ChatRequest.DESCRIPTOR.fields_by_name if "json" not in name}
    assert fields <= set(ChatBody.model_fields)


@pytest.mark.parametrize(
    ("who", "fields", "code", "said"),
    [
        ("bad", {}, "UNAUTHENTICATED", "api key"),
        ("good", {"temperature": 3.0}, "INVALID_ARGUMENT", "temperature"),
        ("good", {"model": "gpt-4"}, "NOT_FOUND", "gpt-4"),
        ("good", {"more_json": "{"}, "INVALID_ARGUMENT", "more_json"),
        ("good", {"more_json": "[" * 100_000}, "INVALID_ARGUMENT", "more_json"),
        ("good", {"more_json": "[]"}, "INVALID_ARGUMENT", "list"),
        ("good", {"more_json": '{"n": 2}'}, "INVALID_ARGUMENT", "n are not"),
        ("good", {"more_json": '{"stream": true}'}, "INVALID_ARGUMENT", "stream"),
        ("good", {"max_tokens": 10**6}, "INVALID_ARGUMENT", "max_tokens"),
    ],
)  # fmt: skip
async def test_errors(door: Any, who: str, fields: dict[str, Any], code: str, said: str) -> None:
    clients, engine, _ = door
    request = changed(**fields)
    for attempt in (clients[who].chat(request), anext(aiter(clients[who].stream(request)))):
        with pytest.raises(grpc.aio.AioRpcError, match=said) as raised:
            await attempt
        assert raised.value.code().name == code
    assert not engine.requests


async def test_lone_surrogates_are_replaced_here_too(door: Any) -> None:
    clients, engine, _ = door
    await clients["good"].chat(changed(more_json=r'{"cache_salt": "a\ud800"}'))
    assert engine.requests[-1].cache_salt.endswith("a\ufffd")


async def test_limits_and_failures(api: Any, door: Any, small: Tokenizer) -> None:
    clients, engine, _ = door
    await clients["one"].chat(HI)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await clients["one"].chat(HI)
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    after = re.search(r"\(retry-after: (\d+)\)$", raised.value.details())
    assert after and 30 < int(after[1]) <= 60
    some = small.encode_text("abc")
    engine.script = lambda r: [*api.deltas_of(r, some, [1, 2])[:-1], ValueError("x")]
    got: list[str] = []
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        async for chunk in clients["good"].stream(HI):
            got.append(chunk.content)
    assert raised.value.code() is grpc.StatusCode.INTERNAL and "".join(got) == "ab"


async def test_a_caller_who_leaves_frees_its_request(api: Any, door: Any, small: Tokenizer) -> None:
    clients, engine, _ = door
    first = small.encode_text("abc")
    engine.script = lambda r: [*api.deltas_of(r, first, [1, 2])[:-1], 60.0]
    stream = clients["good"].stream(HI)
    await anext(aiter(stream))
    assert engine.live == 1
    stream.cancel()
    async with asyncio.timeout(120):
        while engine.live:
            await asyncio.sleep(0.01)
    assert len(engine.cancelled) == 1


async def test_health(api: Any, door: Any) -> None:
    _, engine, opened = door
    ask = HealthCheckRequest()
    assert (await opened.Check(ask)).status == HealthCheckResponse.SERVING
    opened._service.watched.last_token_s = None
    engine.script = lambda r: [ValueError("down")]
    assert (await opened.Check(ask)).status == HealthCheckResponse.NOT_SERVING
    watch = opened.Watch(ask)
    assert (await anext(watch)).status == HealthCheckResponse.NOT_SERVING
    await watch.aclose()


def test_generated_code_is_fresh(tmp_path: Path) -> None:
    """`chat_pb2.py` describes what `chat.proto` says; otherwise run `make proto`."""
    source = Path(__file__).parents[2] / "serve_app"
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", f"-I{source}", f"--python_out={tmp_path}",
         "chat.proto"],
        check=True,
    )  # fmt: skip
    fresh, committed = tmp_path / "chat_pb2.py", source / "chat_pb2.py"

    def described(file: Path) -> str:
        (line,) = (x for x in file.read_text().splitlines() if "AddSerializedFile" in x)
        return line

    assert described(fresh) == described(committed)
