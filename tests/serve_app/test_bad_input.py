"""Whatever a caller sends: an error in OpenAI's shape with the right status; the server lives."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, MutableMapping, Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rayseek.cluster.request import Delta, Request, Token
from rayseek.cluster.wire import request_of, submit_message
from rayseek.serve_app import protocol
from rayseek.serve_app.errors import from_validation
from rayseek.serve_app.settings import ApiSettings
from rayseek.serve_app.tokenizer import Tokenizer

USER = [{"role": "user", "content": "Hi"}]
BODY = {"model": "deepseek-v3", "messages": USER}
CHAT = "/v1/chat/completions"
TOOL = {"type": "function", "function": {"name": "f"}}
INF = float("inf")


def message_with(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hi", **fields}]}


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": ["Hi"]}, "messages[0]"),
    (message_with(role="wizard"), "messages[0].role"),
    (message_with(role="function"), "messages[0].role"),
    (message_with(content=None), "messages[0].content"),
    (message_with(content=5), "messages[0].content"),
    (message_with(content=[{"type": "image_url", "image_url": {}}]), "messages[0].content"),
    (message_with(content=[{"type": "input_audio"}]), "messages[0].content"),
    (message_with(content=["Hi"]), "messages[0].content"),
    (message_with(role="tool"), "messages[0].tool_call_id"),
    (message_with(role="tool", tool_call_id="1"), "messages[0].tool_call_id"),
    (message_with(role="assistant", content=None), "messages[0]"),
    (
        message_with(tool_calls=[{"id": "1", "function": {"name": "f", "arguments": {}}}]),
        "messages[0].tool_calls[0].function.arguments",
    ),
    ({"model": "gpt-4"}, "model"),
    ({"model": None}, "model"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": INF}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"n": 0}, "n"),
    ({"n": 1000}, "n"),
    ({"n": True}, "n"),
    ({"stop": ["x"] * 100}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop"),
    ({"stop": "x" * 5000}, "stop"),
    ({"stop": [1]}, "stop[0]"),
    ({"stop": {"a": 1}}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"frequency_penalty": 3}, "frequency_penalty"),
    ({"presence_penalty": -3}, "presence_penalty"),
    ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"30": 101}}, "logit_bias.30"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"top_logprobs": 5}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 1.0}, "seed"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 1.5}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"min_tokens": 10, "max_tokens": 5}, "min_tokens"),
    ({"stop_token_ids": [10**9]}, "stop_token_ids"),
    ({"priority": 2**40}, "priority"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"functions": []}, "functions"),
    ({"function_call": "auto"}, "function_call"),
    ({"audio": {}}, "audio"),
    ({"modalities": ["audio"]}, "modalities[0]"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": "any", "tools": [TOOL]}, "tool_choice"),
    (
        {"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [TOOL]},
        "tool_choice",
    ),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [TOOL] * 129}, "tools"),
]


NESTED: Any = [0] * 6000
for _ in range(60):
    NESTED = [NESTED]
BAD_FIELDS.append(  # 18 KB, indented 1.5 MB
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"x": NESTED}}}]},
     "tools")
)  # fmt: skip


def is_openai_error(reply: Any, status: int) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"]
    return error


@pytest.mark.parametrize(("fields", "param"), BAD_FIELDS, ids=lambda value: str(value)[:60])
async def test_bad_fields(
    api: Any, small: Tokenizer, settings: ApiSettings, fields: dict[str, Any], param: str
) -> None:
    engine = api.saying(small)
    async with api.client_of(api.build_app(settings, small, engine)) as client:
        reply = await client.post(CHAT, content=json.dumps({**BODY, **fields}))
    error = is_openai_error(reply, 404 if fields.get("model") else 400)
    assert error["param"] == param
    assert engine.requests == []


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"null", 400),
        (b'{"model": "\xff"}', 400),
        (b'{"model": 1' + b"0" * 5000 + b"}", 400),
        (b"[" * 100_000, 400),
        (b'{"model": "\\ud800", "messages": "\\udfff", "prompt": 1}', 400),
        (b'{"messages": "' + b"x" * 2**21 + b'"}', 413),
    ],
    ids=lambda value: str(value)[:30],
)
async def test_bad_bodies(
    api: Any, small: Tokenizer, settings: ApiSettings, content: bytes, status: int
) -> None:
    async with api.client_of(api.build_app(settings, small, api.saying(small))) as client:
        for path in (CHAT, "/completions"):
            is_openai_error(await client.post(path, content=content), status)
        assert (await client.post(CHAT, json=BODY)).status_code == 200


async def test_an_encoded_body_is_refused_as_such(
    api: Any, small: Tokenizer, settings: ApiSettings
) -> None:
    async with api.client_of(api.build_app(settings, small, api.saying(small))) as client:
        for coding, status in (("gzip", 415), ("Identity", 200)):
            headers = {"Content-Encoding": coding}
            assert (await client.post(CHAT, json=BODY, headers=headers)).status_code == status


async def test_lone_surrogates_are_served_as_replacement_characters(
    api: Any, small: Tokenizer, settings: ApiSettings
) -> None:
    content = rb'{"model": "deepseek-v3", "prompt": "a\ud800\ud83d\ude00", "echo": true}'
    async with api.client_of(api.build_app(settings, small, api.saying(small, "b"))) as client:
        answer = (await client.post("/completions", content=content)).json()
    assert answer["choices"][0]["text"] == "a\ufffd😀b"


async def test_body_limit_holds_while_reading(
    api: Any, small: Tokenizer, settings: ApiSettings
) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 2**16
            yield b" " * 2**16

    async with api.client_of(api.build_app(settings, small, api.saying(small))) as client:
        is_openai_error(await client.post(CHAT, content=endless()), 413)
    assert sent <= 10 * settings.body_limit_bytes


async def test_context_overflow(api: Any, small: Tokenizer, settings: ApiSettings) -> None:
    """Only what was asked for explicitly is refused; the default shrinks to what is left."""
    engine = api.saying(small)
    async with api.client_of(api.build_app(settings, small, engine)) as client:
        long = {**BODY, "messages": [{"role": "user", "content": "x" * 4000}]}
        assert (await client.post(CHAT, json=long)).status_code == 200
        assert engine.requests[-1].sampling.max_tokens == 4096 - 4003
        error = is_openai_error(await client.post(CHAT, json={**long, "max_tokens": 100}), 400)
        assert error["message"] == (
            "This model's maximum context length is 4096 tokens. However, you requested 4103 tokens"
            " (4003 in the messages, 100 in the completion). Please reduce the length of the "
            "messages or completion."
        )
        full = {**BODY, "messages": [{"role": "user", "content": "x" * 9000}]}
        assert is_openai_error(await client.post(CHAT, json=full), 400)["code"] == (
            "context_length_exceeded"
        )


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/messages/count_tokens"])
@pytest.mark.parametrize("parts", [1, 400])
async def test_far_too_much_is_refused_before_it_is_tokenised(
    api: Any, settings: ApiSettings, path: str, parts: int
) -> None:
    tokenizer = Tokenizer(api.byte_tokenizer_file())
    encoded = 0
    encode = tokenizer.encode_texts

    def counted(texts: Sequence[str]) -> list[list[int]]:
        nonlocal encoded
        encoded += sum(map(len, texts))
        return encode(texts)

    tokenizer.encode_texts = counted  # type: ignore[method-assign]
    text = "x" * (400_000 // parts)
    prompt: Any = text if parts == 1 else [text] * parts
    body = {**BODY, "messages": [{"role": "user", "content": text}] * parts, "prompt": prompt}
    async with api.client_of(api.build_app(settings, tokenizer, api.saying(tokenizer))) as client:
        reply = await client.post(path, json=body)
        assert reply.status_code == 400
        message = reply.json()["error"]["message"]
    if "param" in reply.json()["error"] and "context" in message:
        assert reply.json()["error"]["param"] == ("messages" if path == CHAT else "prompt")
    assert ("choices" if parts > 1 and path == "/v1/completions" else "maximum context") in message
    assert encoded < 70_000


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"messages": [0] * 5000}),
        (CHAT, {"messages": [{"role": "assistant", "tool_calls": [0] * 5000}]}),
        (CHAT, {"stop": [0] * 5000}),
        (CHAT, {"modalities": [0] * 5000}),
        (CHAT, {"logit_bias": {str(i): "" for i in range(5000)}}),
        (CHAT, {"tools": [0] * 5000}),
        ("/v1/completions", {"stop_token_ids": [""] * 5000}),
        ("/v1/messages", {"messages": [0] * 5000}),
        ("/v1/messages", {"messages": [{"role": "user", "content": [0] * 5000}]}),
        ("/v1/messages", {"system": [0] * 5000, "tools": [0] * 5000, "stop_sequences": [0] * 5000}),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_of_many_wrong_items_one_is_told(
    api: Any, small: Tokenizer, settings: ApiSettings, monkeypatch: pytest.MonkeyPatch, path: str,
    fields: dict[str, Any],
) -> None:  # fmt: skip
    """The problems of 800 KB of zeros took 400 MB."""
    told: list[int] = []

    def counted(problems: Sequence[Any]) -> Any:
        told.append(len(problems))
        return from_validation(problems)

    monkeypatch.setattr(protocol, "from_validation", counted)
    async with api.client_of(api.build_app(settings, small, api.saying(small))) as client:
        reply = await client.post(path, json={**BODY, "max_tokens": 5, **fields})
    assert reply.status_code == 400 and told[0] <= 3


async def test_unknown_paths_methods_and_keys(
    api: Any, small: Tokenizer, settings: ApiSettings
) -> None:
    app = api.build_app(settings, small, api.saying(small))
    async with api.client_of(app) as client:
        is_openai_error(await client.post("/v1/embeddings", json={}), 404)
        reply = await client.get(CHAT)
        is_openai_error(reply, 405)
        assert reply.headers["allow"] == "POST"
        for header, text in (
            ("Bearer sk-wrong-00000000cd99", "****cd99 is invalid"),
            ("Bearer short", "**** is invalid"),
            ("Basic abc", "auth header format should be Bearer sk-..."),
            ("", "auth header format should be Bearer sk-..."),
        ):
            reply = await client.post(CHAT, json=BODY, headers={"Authorization": header})
            error = is_openai_error(reply, 401)
            assert text in error["message"] and error["type"] == "authentication_error"
            assert reply.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": []},
        {"prompt": [True]},
        {"prompt": [10**9]},
        {"prompt": [1, "a"]},
        {"prompt": ["a"] * 17},
        {"prompt": [[0]] * 1025},
        {"prompt": [1], "suffix": "b"},
        {"prompt": "a", "suffix": "b", "echo": True},
        {"prompt": "a", "logprobs": 21},
        {"prompt": "a", "best_of": 3},
    ],
    ids=str,
)
async def test_bad_completions(
    api: Any, small: Tokenizer, settings: ApiSettings, fields: dict[str, Any]
) -> None:
    async with api.client_of(api.build_app(settings, small, api.saying(small))) as client:
        reply = await client.post("/v1/completions", json={"model": "deepseek-v3", **fields})
    assert is_openai_error(reply, 400)["param"] in {*fields, "n"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "text", "role", "content", "a"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)
NAMES = sorted({name for fields, _ in BAD_FIELDS for name in fields} - {"model"})


@given(fields=st.dictionaries(st.sampled_from(NAMES), JSON, max_size=3))
def test_no_body_hurts_the_server(
    api: Any, small: Tokenizer, settings: ApiSettings, fields: dict[str, Any]
) -> None:
    """Law 6: any JSON is served or refused, never an internal error, and nothing is left over."""

    async def run() -> None:
        engine = api.saying(small)
        async with api.client_of(api.build_app(settings, small, engine)) as client:
            reply = await client.post(CHAT, content=json.dumps({**BODY, **fields}))
            if reply.status_code != 200:
                is_openai_error(reply, 400)
        assert engine.live == 0

    asyncio.run(run())


EXTREME = st.sampled_from(
    [sign * 2**bits + step for bits in (7, 15, 31, 32, 63, 64, 128) for sign in (1, -1)
     for step in (-1, 0, 1)] + [0, 9 * 10**4299]
)  # fmt: skip
INTEGER_FIELDS: dict[str, st.SearchStrategy[Any]] = dict.fromkeys(
    ("max_tokens", "max_completion_tokens", "n", "best_of", "seed", "top_k", "min_tokens",
     "priority", "logprobs", "top_logprobs", "temperature", "top_p", "min_p",
     "repetition_penalty", "frequency_penalty", "presence_penalty"),
    EXTREME,
) | {
    "stop_token_ids": st.lists(EXTREME, max_size=2),
    "logit_bias": st.dictionaries(EXTREME.map(str), EXTREME, max_size=2),
    "prompt": st.lists(EXTREME, min_size=1, max_size=2),
}  # fmt: skip
INTEGERS = st.lists(
    st.one_of(*(st.tuples(st.just(name), value) for name, value in INTEGER_FIELDS.items())),
    max_size=2,
).map(dict)


@given(fields=INTEGERS, path=st.sampled_from([CHAT, "/v1/completions"]))
@example(fields={"prompt": ["a"] * 16, "n": 9 * 10**4299}, path="/v1/completions")
@example(fields={"top_k": 2**32}, path=CHAT)
def test_every_integer_is_refused_or_reaches_a_rank(
    api: Any, small: Tokenizer, settings: ApiSettings, fields: dict[str, Any], path: str
) -> None:
    def as_it_arrives(request: Request) -> list[Delta]:
        message = submit_message(1, request)
        message.ParseFromString(message.SerializeToString())
        assert request_of(message, request.id) == request
        return api.deltas_of(request, [small.eos_id])

    async def run() -> None:
        app = api.build_app(settings, small, api.ScriptedEngine(as_it_arrives))
        async with api.client_of(app) as client:
            reply = await client.post(path, content=json.dumps({**BODY, **fields}))
            if reply.status_code != 200:
                is_openai_error(reply, 400)

    asyncio.run(run())


def scope_of(key: str) -> dict[str, Any]:
    return {
        "type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(),
        "headers": [(b"authorization", f"Bearer {key}".encode())],
        "query_string": b"", "root_path": "", "scheme": "http", "server": ("test", 80),
        "client": ("test", 1), "http_version": "1.1", "asgi": {"version": "3.0"},
    }  # fmt: skip


async def test_who_leaves_while_sending_is_no_error_of_the_server(
    api: Any, small: Tokenizer, settings: ApiSettings, caplog: pytest.LogCaptureFixture
) -> None:
    app = api.build_app(settings, small, api.saying(small))
    inbox = iter([{"type": "http.request", "body": b"{", "more_body": True},
                  {"type": "http.disconnect"}])  # fmt: skip
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return next(inbox)

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    await app(scope_of(api.KEY), receive, send)
    assert sent[0]["status"] == 400
    assert not [record for record in caplog.records if record.name == "rayseek.api"]


@pytest.mark.parametrize(("stream", "reads"), [(False, True), (True, True), (True, False)])
async def test_disconnect_cancels_the_request(
    api: Any, small: Tokenizer, settings: ApiSettings, stream: bool, reads: bool
) -> None:
    """The ASGI conversation by hand: the client leaves while the engine is silent, or while what
    was sent to it is stuck."""
    token = Delta("", (Token(small.encode_text("a")[0]),))
    engine = api.ScriptedEngine(lambda r: [60.0] if reads else [token, token, token])
    app = api.build_app(settings, small, engine)
    inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    body = json.dumps({**BODY, "stream": stream}).encode()
    inbox.put_nowait({"type": "http.request", "body": body, "more_body": False})
    sent: list[MutableMapping[str, Any]] = []
    stuck = asyncio.Event()

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)
        if not reads and message.get("body"):
            stuck.set()
            await asyncio.Event().wait()

    scope = scope_of(api.KEY)
    exchange = asyncio.create_task(app(scope, inbox.get, send))
    while not (engine.live if reads else stuck.is_set()):
        await asyncio.sleep(0.001)
    inbox.put_nowait({"type": "http.disconnect"})
    await asyncio.wait_for(exchange, 120)
    assert engine.live == 0 and len(engine.cancelled) == 1
