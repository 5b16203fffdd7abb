"""The API through the whole ASGI application, over a scripted engine."""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import replace
from typing import Any

import pytest

from rayseek.cluster.request import Delta, FinishReason, RequestRefused, Token
from rayseek.serve_app.openapi import Ready
from rayseek.serve_app.readiness import told_moves
from rayseek.serve_app.service import Service
from rayseek.serve_app.settings import ApiSettings
from rayseek.serve_app.tokenizer import Control, Tokenizer

USER = [{"role": "user", "content": "Hi"}]
BODY = {"model": "deepseek-v3", "messages": USER}
CHAT = "/v1/chat/completions"


def events_of(text: str) -> list[Any]:
    """The JSON of each event of a stream, checking its frame."""
    lines = [line for line in text.split("\n\n") if line and not line.startswith(":")]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


async def test_chat(api: Any, small: Tokenizer, settings: ApiSettings) -> None:
    engine = api.saying(small, cached=3)
    async with api.client_of(api.build_app(settings, small, engine)) as client:
        reply = await client.post(CHAT, json=BODY)
    answer = reply.json()
    assert reply.status_code == 200
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello, wörld! 😀"},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    # BOS, User, two bytes, Assistant; and EOS is not counted.
    completion = len("Hello, wörld! 😀".encode())
    assert answer["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": completion,
        "total_tokens": 5 + completion,
        "prompt_tokens_details": {"cached_tokens": 3},
        "completion_tokens_details": {
            "accepted_prediction_tokens": (completion + 1) // 3,
            "rejected_prediction_tokens": completion // 3,
        },
        "prompt_cache_hit_tokens": 3,
        "prompt_cache_miss_tokens": 2,
    }
    assert answer["object"] == "chat.completion" and answer["model"] == "deepseek-v3"
    assert {"id", "created"} <= answer.keys()
    assert answer["system_fingerprint"] == engine.fingerprint
    (request,) = engine.requests
    assert request.id == answer["id"]
    assert request.sampling.temperature == pytest.approx(0.3)
    assert request.sampling.stop_token_ids == (small.eos_id,)
    assert request.sampling.max_tokens == 1024
    assert engine.live == 0


async def test_stream_shape(api: Any, small: Tokenizer, settings: ApiSettings) -> None:
    app = api.build_app(settings, small, api.saying(small, "a\u2028好"))
    async with api.client_of(app) as client:
        reply = await client.post(CHAT, json={**BODY, "stream": True})
        with_usage = await client.post(
            CHAT, json={**BODY, "stream": True, "stream_options": {"include_usage": True}}
        )
    assert reply.headers["content-type"].startswith("text/event-stream")
    chunks = events_of(reply.text)
    assert [c["choices"][0]["delta"] for c in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "a"},
        {"content": "\u2028"},
        {"content": "好"},
        {"content": ""},
    ]
    assert "好" in reply.text and "\u2028" not in reply.text
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * 4 + ["stop"]
    assert [c["choices"][0]["logprobs"] for c in chunks] == [None] * 5
    assert len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert ["usage" in c for c in chunks] == [False] * 4 + [True]
    usage = chunks[-1]["usage"]
    chunks = events_of(with_usage.text)
    assert [c["usage"] is None for c in chunks] == [True] * 5 + [False]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == usage


async def test_choices_have_their_own_seeds(
    api: Any, small: Tokenizer, settings: ApiSettings
) -> None:
    engine = api.ScriptedEngine(
        lambda r: api.deltas_of(
            r, [*small.encode_text(f"seed {r.sampling.seed}"), small.eos_id], range(99)
        )
    )
    app = api.build_app(settings, small, engine)
    body = {**BODY, "n": 3, "seed": -1}
    async with api.client_of(app) as client:
        answer = (await client.post(CHAT, json=body)).json()
        chunks = events_of((await client.post(CHAT, json={**body, "stream": True})).text)
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert texts == [f"seed {2**64 - 1}", "seed 0", "seed 1"]
    for index, text in enumerate(texts):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(c["delta"]["content"] for c in mine) == text
        assert mine[0]["delta"]["role"] == "assistant" and mine[-1]["finish_reason"] == "stop"
    assert [c["usage"] for c in chunks if "usage" in c] == [answer["usage"]]
    assert answer["usage"]["prompt_tokens"] == 5


async def test_completions(api: Any, v3: Tokenizer, settings: ApiSettings) -> None:
    engine = api.saying(v3, " there was")
    async with api.client_of(api.build_app(settings, v3, engine)) as client:

        async def ask(**body: Any) -> Any:
            return (
                await client.post("/v1/completions", json={"model": "deepseek-v3", **body})
            ).json()

        answer = await ask(prompt="Once", logprobs=1)
        echoed = await ask(prompt="Once", echo=True)
        several = await ask(prompt=["a", "b"], n=2)
        by_ids = await ask(prompt=[5, 6, 7])
        await ask(prompt="def f(", suffix="")
        default = await ask()
        streamed = await client.post(
            "/beta/completions",
            json={"model": "deepseek-v3", "prompt": "Once", "echo": True, "stream": True},
        )
    assert answer["object"] == "text_completion"
    (choice,) = answer["choices"]
    assert choice["text"] == " there was" and choice["finish_reason"] == "stop"
    assert choice["logprobs"]["tokens"] == [" there", " was"]
    assert choice["logprobs"]["text_offset"] == [0, 6]
    assert len(choice["logprobs"]["token_logprobs"]) == 2
    assert set(choice["logprobs"]["top_logprobs"][0].values()) >= {-9999.0}
    assert echoed["choices"][0]["text"] == "Once there was"
    assert [c["index"] for c in several["choices"]] == [0, 1, 2, 3]
    assert several["usage"]["prompt_tokens"] == 4
    assert by_ids["usage"]["prompt_tokens"] == 3
    assert engine.requests[0].prompt_ids == (0, *v3.encode_text("Once"))
    assert engine.requests[7].prompt_ids == (0, 128801, *v3.encode_text("def f("), 128800, 128802)
    assert default["usage"]["prompt_tokens"] == 1 + len(v3.encode_text("Once upon a time, "))
    texts = [c["choices"][0]["text"] for c in events_of(streamed.text)]
    assert texts == ["Once", " there", " was", ""]


async def test_chat_logprobs(api: Any, small: Tokenizer, settings: ApiSettings) -> None:
    app = api.build_app(settings, small, api.saying(small, "aé"))
    async with api.client_of(app) as client:
        body = {**BODY, "logprobs": True, "top_logprobs": 2}
        answer = (await client.post(CHAT, json=body)).json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [[b] for b in "aé".encode()]
    assert content[0]["token"] == "a" and content[1]["token"] == "\ufffd"
    assert all(math.isfinite(t["logprob"]) for e in content for t in e["top_logprobs"])
    assert [len(entry["top_logprobs"]) for entry in content] == [2, 2, 2]


@pytest.mark.parametrize(
    ("asked", "mapped"),
    [(None, 0.3), (0, 0), (1e-7, 3e-8), (0.5, 0.15), (1, 0.3), (1.3, 0.6), (1.5, 0.8), (2, 1.3)],
)
async def test_temperature_mapping(
    api: Any, small: Tokenizer, settings: ApiSettings, asked: float | None, mapped: float
) -> None:
    for mapping, expected in (("deepseek", mapped), ("none", 1.0 if asked is None else asked)):
        engine = api.saying(small)
        app = api.build_app(replace(settings, temperature_mapping=mapping), small, engine)
        async with api.client_of(app) as client:
            assert (await client.post(CHAT, json={**BODY, "temperature": asked})).is_success
        assert engine.requests[0].sampling.temperature == pytest.approx(expected)


async def test_parameters_reach_the_engine(
    api: Any, small: Tokenizer, settings: ApiSettings
) -> None:
    engine = api.saying(small)
    body = {
        **BODY, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 2,
        "frequency_penalty": 0.5, "presence_penalty": -0.5, "logit_bias": {"30": -100, "20": 1},
        "seed": 7, "stop_token_ids": [21], "max_tokens": 9, "max_completion_tokens": 8,
        "cache_salt": "me", "priority": -3, "user": "x", "unheard_of": 1, "store": False,
        "response_format": {"type": "text"}, "reasoning_effort": "low",
    }  # fmt: skip
    async with api.client_of(api.build_app(settings, small, engine)) as client:
        assert (await client.post(CHAT, json=body)).is_success
        assert (await client.post(CHAT, json={**BODY, "ignore_eos": True})).is_success
    request = engine.requests[0]
    sampling = request.sampling
    assert (sampling.top_k, sampling.top_p, sampling.min_p) == (5, 0.9, 0.1)
    assert (sampling.repetition_penalty, sampling.min_tokens) == (1.1, 2)
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (0.5, -0.5)
    assert sampling.logit_bias == ((20, 1.0), (30, -100.0))
    assert (sampling.seed, sampling.max_tokens) == (7, 8)
    assert sampling.stop_token_ids == (small.eos_id, 21)
    assert request.cache_salt.endswith("me")
    assert engine.requests[1].sampling.stop_token_ids == ()
    assert engine.requests[1].sampling.seed != 7


async def test_models_and_state(api: Any, small: Tokenizer, settings: ApiSettings) -> None:
    app = api.build_app(settings, small, api.saying(small))
    async with api.client_of(app) as client:
        listed = (await client.get("/v1/models")).json()
        assert [m["id"] for m in listed["data"]] == ["deepseek-v3", "deepseek-chat"]
        assert (await client.get("/models/deepseek-chat")).json()["id"] == "deepseek-chat"
        assert (await client.get("/v1/models/no")).status_code == 404
        document = (await client.get("/openapi.json")).json()
    assert "ChatMessage" in document["components"]["schemas"]
    async with api.client_of(app, key=None) as client:
        assert (await client.get("/health")).json() == {"status": "alive"}
        assert (await client.get("/ready")).json()["ready"] is True
        assert "deepseek-v3" in (await client.get("/")).text
        for path in ("/v1/models", "/v1/models/x"):
            assert (await client.get(path)).status_code == 401


async def test_ready_tells_why_not(api: Any, small: Tokenizer, settings: ApiSettings) -> None:
    scripts: list[tuple[Any, str]] = [
        (lambda r: [60.0], "no token within 0.05 s"),
        (lambda r: [RequestRefused("no rank is up")], "no rank is up"),
        (lambda r: [Delta(r.id, finish=FinishReason.ERROR, error="broken")], "broken"),
        (lambda r: [], "sent nothing"),
    ]
    for script, text in scripts:
        engine, patience_s = api.ScriptedEngine(script), 0.05 if "within" in text else 60.0
        probed = replace(settings, probe_timeout_s=patience_s, ready_window_s=0.0)
        async with api.client_of(api.build_app(probed, small, engine)) as client:
            replies = await asyncio.gather(*(client.get("/ready") for _ in range(3)))
        assert [reply.status_code for reply in replies] == [503] * 3
        assert text in replies[0].json()["reason"]
        assert len(engine.requests) == 1 and engine.live == 0


async def test_ready_tells_which_requests_moved(
    api: Any, small: Tokenizer, settings: ApiSettings
) -> None:
    engine = api.saying(small)
    moved = [f"id-{n}" for n in range(7)] + ["id-3"]
    service = Service(settings, small, engine, lambda: told_moves(moved))
    async with api.client_of(api.build_app(settings, small, engine, service)) as client:
        state = (await client.get("/ready")).json()
    assert state["ready"] is True
    (sentence,) = state["degraded"]
    assert sentence.startswith("7 requests moved") and "last 60 s" in sentence
    assert sentence.endswith("the last: id-3, id-6, id-5, id-4, id-2, and 2 before")
    assert told_moves([]) == []
    Ready.model_validate(state)


async def test_stop_string_cancels_the_engine(
    api: Any, small: Tokenizer, settings: ApiSettings
) -> None:
    engine = api.saying(small, "one two three")
    async with api.client_of(api.build_app(settings, small, engine)) as client:
        answer = (await client.post(CHAT, json={**BODY, "stop": "two"})).json()
    assert answer["choices"][0]["message"]["content"] == "one "
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 7
    assert engine.cancelled == [answer["id"]] and engine.live == 0


async def test_one_failing_choice_cancels_the_others(
    api: Any, small: Tokenizer, settings: ApiSettings
) -> None:
    engine = api.ScriptedEngine(
        lambda r: [RequestRefused("full")] if r.id.endswith("-1") else [60.0]
    )
    async with api.client_of(api.build_app(settings, small, engine)) as client:
        for stream in (False, True):
            reply = await client.post(CHAT, json={**BODY, "n": 3, "stream": stream})
            assert reply.status_code == 503 and engine.live == 0


async def test_special_tokens_are_shown_on_request(
    api: Any, small: Tokenizer, settings: ApiSettings
) -> None:
    """EOS ends the answer unless ignored; then it is a token like others, by default hidden."""
    ids = [*small.encode_text("a"), small.eos_id, small.id_of(Control.USER)]
    engine = api.ScriptedEngine(lambda r: api.deltas_of(r, ids))
    app = api.build_app(settings, small, engine)
    async with api.client_of(app) as client:
        for fields, text, count in (
            ({}, "a", 1),
            ({"ignore_eos": True}, "a<｜User｜>", 3),
            (
                {"ignore_eos": True, "skip_special_tokens": False},
                "a<｜end▁of▁sentence｜><｜User｜>",
                3,
            ),
        ):
            answer = (await client.post(CHAT, json={**BODY, **fields})).json()
            assert answer["choices"][0]["message"]["content"] == text
            assert answer["usage"]["completion_tokens"] == count


async def test_errors_before_and_within_a_stream(
    api: Any, small: Tokenizer, settings: ApiSettings
) -> None:
    token = small.encode_text("a")[0]

    def late(request: Any) -> list[Any]:
        return [Delta(request.id, (Token(token),)), ValueError("secret detail")]

    early = api.ScriptedEngine(lambda r: [RequestRefused("the queue is full", True, 2.5)])
    never = api.ScriptedEngine(lambda r: [RequestRefused("too long", retryable=False)])
    for stream in (False, True):
        body = {**BODY, "stream": stream}
        async with api.client_of(api.build_app(settings, small, early)) as client:
            reply = await client.post(CHAT, json=body)
            assert reply.status_code == 503 and reply.headers["retry-after"] == "3"
            assert reply.json()["error"]["message"] == "the queue is full"
        async with api.client_of(api.build_app(settings, small, never)) as client:
            assert (await client.post(CHAT, json=body)).status_code == 400
        engine = api.ScriptedEngine(late)
        async with api.client_of(api.build_app(settings, small, engine)) as client:
            reply = await client.post(CHAT, json=body)
        assert "secret" not in reply.text and engine.live == 0
        if stream:
            last = reply.text.strip().split("\n\n")[-1]
            assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
        else:
            assert reply.status_code == 500


async def test_silent_engine_gets_keep_alive_comments(
    api: Any, small: Tokenizer, settings: ApiSettings
) -> None:
    token = small.encode_text("a")[0]

    def slow(request: Any) -> list[Any]:
        end = Delta(request.id, (), FinishReason.STOP)
        return [0.2, Delta(request.id, (Token(token),)), 0.2, end]

    app = api.build_app(replace(settings, keep_alive_s=0.05), small, api.ScriptedEngine(slow))
    async with api.client_of(app) as client:
        reply = await client.post(CHAT, json={**BODY, "stream": True})
    frames = reply.text.split("\n\n")
    first = next(i for i, frame in enumerate(frames) if frame.startswith("data"))
    assert first >= 1 and frames[0] == ": keep-alive"
    assert ": keep-alive" in frames[first:]
    text = "".join(c["choices"][0]["delta"]["content"] for c in events_of(reply.text))
    assert text == "a"


async def test_declared_tools_are_shown_to_the_model(
    api: Any, v3: Tokenizer, settings: ApiSettings, vectors: dict[str, Any]
) -> None:
    vector = next(v for v in vectors["api_usage_evidence"] if v["id"] == "E5")
    parameters = [
        {"additionalProperties": False, "type": "object", "properties": p, "required": list(p)}
        for p in (
            {"groupName": {"type": "string", "description": "group name"}},
            {},
            {"groupName": {"type": "string", "description": "group name"}},
        )
    ]
    names = ("createGroup", "listGroups", "deleteGroup")
    texts = ("Creat user group", "List all user group", "Delete user group")
    tools = [
        {"type": "function", "function": {"parameters": p, "name": n, "description": d}}
        for n, d, p in zip(names, texts, parameters, strict=True)
    ]
    body = {
        "model": "deepseek-chat",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "列出所有的用户组"}]}],
        "tools": tools,
        "tool_choice": "auto",
    }
    engine = api.saying(v3)
    async with api.client_of(api.build_app(settings, v3, engine)) as client:
        answer = (await client.post("/chat/completions", json=body)).json()
    assert list(engine.requests[0].prompt_ids) == vector["ids"]
    assert answer["usage"]["prompt_tokens"] == 271 and answer["model"] == "deepseek-chat"
