"""Each field of spec section 6.5, column "ours": what it does, or that it changes nothing.

What is refused stands in `test_bad_input.py`, tools and grammars in files of their own.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from rayseek.cluster.request import Request
from rayseek.serve_app.settings import ApiSettings
from rayseek.serve_app.tokenizer import Tokenizer

ROOTS = ("", "/v1", "/beta")
USER = {"role": "user", "content": "Hi"}
BODY = {"model": "deepseek-v3", "messages": [USER], "seed": 5}


@pytest.fixture
def ask(api: Any, small: Tokenizer, settings: ApiSettings) -> Any:
    """Posts a body; gives the status, the document, and what the engine was asked."""

    async def ask(
        path: str, body: dict[str, Any], **changed: Any
    ) -> tuple[int, Any, list[Request]]:
        engine = api.saying(small, "abcdef")
        app = api.build_app(replace(settings, shared_cache=True, **changed), small, engine)
        async with api.client_of(app) as client:
            reply = await client.post(path, content=json.dumps(body))
        return reply.status_code, reply.json(), engine.requests

    return ask


async def plain_request(ask: Any) -> Request:
    [request] = (await ask("/v1/chat/completions", BODY))[2]
    return request


IGNORED: list[dict[str, Any]] = [
    {"user": "u"},
    {"metadata": {"a": "b"}},
    {"store": False},
    {"service_tier": "auto"},
    {"service_tier": "default"},
    {"prompt_cache_key": "k"},
    {"safety_identifier": "s"},
    {"reasoning_effort": "high"},
    {"verbosity": "low"},
    {"prediction": {"type": "content", "content": "x"}},
    {"moderation": {}},
    {"modalities": ["text"]},
    {"add_generation_prompt": True},
    {"chat_template": "{{ x }}"},
    {"chat_template_kwargs": {"thinking": True}},
    {"documents": [{"text": "x"}]},
    {"echo": True},
    {"kv_transfer_params": {}},
    {"return_token_ids": True},
    {"request_id": "r"},
    {"never_heard_of": [1, {"a": None}]},
    {"parallel_tool_calls": True},
    {"tools": []},
    {"response_format": {"type": "text"}},
    {"stream_options": None},
    {"functions": None},
    {"function_call": None},
    {"audio": None},
    {"web_search_options": None},
    {"files": []},
    {"files": None},
    {"web_search_results": None},
    {"continue_final_message": False},
    {"logprobs": False},
    {"n": 1},
    {"temperature": 1},
    {"temperature_scale": "model"},
    {"messages": [{**USER, "name": "Ann"}]},
    {"messages": [{**USER, "prefix": False}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in "Hi"]}]},
    *({name: None} for name in (
        "temperature", "top_p", "max_tokens", "max_completion_tokens", "n", "stop", "stream",
        "frequency_penalty", "presence_penalty", "logit_bias", "logprobs", "top_logprobs",
        "response_format", "tools", "tool_choice", "parallel_tool_calls", "top_k", "min_p",
        "repetition_penalty", "min_tokens", "stop_token_ids", "ignore_eos", "skip_special_tokens",
        "include_stop_str_in_output", "no_stop_trim", "priority", "cache_salt",
    )),
]  # fmt: skip


@pytest.mark.parametrize("fields", IGNORED, ids=lambda f: str(f)[:60])
async def test_fields_that_change_nothing(ask: Any, fields: dict[str, Any]) -> None:
    status, answer, [request] = await ask("/v1/chat/completions", {**BODY, **fields})
    assert status == 200, answer
    assert replace(request, id="") == replace(await plain_request(ask), id="")
    [choice] = answer["choices"]
    assert choice["message"]["content"] == "abcdef" and choice["logprobs"] is None


EFFECTS: list[tuple[dict[str, Any], str, Any]] = [
    ({"temperature": 0.7, "temperature_scale": "model"}, "sampling.temperature", 0.7),
    ({"temperature": 2, "temperature_scale": "api"}, "sampling.temperature", 1.3),
    ({"temperature": 0}, "sampling.greedy", True),
    ({"temperature": 3e-5}, "sampling.greedy", True),  # the model's 0.9e-5
    ({"top_p": 1}, "sampling.top_p", 1.0),
    ({"max_tokens": 2048}, "sampling.max_tokens", 2048),
    ({"max_tokens": 5, "max_completion_tokens": 7}, "sampling.max_tokens", 7),
    ({"max_completion_tokens": 7}, "sampling.max_tokens", 7),
    ({}, "sampling.max_tokens", 1024),
    ({"frequency_penalty": -2}, "sampling.frequency_penalty", -2.0),
    ({"presence_penalty": 2}, "sampling.presence_penalty", 2.0),
    ({"logit_bias": {"30": 100}}, "sampling.logit_bias", ((30, 100.0),)),
    ({"logprobs": True}, "sampling.logprobs", 0),
    ({"logprobs": True, "top_logprobs": 20}, "sampling.logprobs", 20),
    ({"seed": -(2**63)}, "sampling.seed", 2**63),
    ({"top_k": -1}, "sampling.top_k", 0),
    ({"min_p": 1}, "sampling.min_p", 1.0),
    ({"repetition_penalty": 2}, "sampling.repetition_penalty", 2.0),
    ({"min_tokens": 3}, "sampling.min_tokens", 3),
    ({"ignore_eos": True}, "sampling.stop_token_ids", ()),
    ({"cache_salt": "c"}, "cache_salt", "c"),
    ({"priority": -1}, "priority", 0),  # ends in the fair queue
]


@pytest.mark.parametrize(("fields", "path", "value"), EFFECTS, ids=str)
async def test_fields_that_reach_the_engine(
    ask: Any, fields: dict[str, Any], path: str, value: Any
) -> None:
    status, answer, [request] = await ask("/v1/chat/completions", {**BODY, **fields})
    assert status == 200, answer
    seen: Any = request
    for name in path.split("."):
        seen = getattr(seen, name)
    assert seen == pytest.approx(value) if isinstance(value, float) else seen == value


TEXTS: list[tuple[dict[str, Any], str, str]] = [
    ({"stop": "d"}, "abc", "stop"),
    ({"stop": ["x"] * 15 + ["e"]}, "abcd", "stop"),
    ({"stop": "cd", "include_stop_str_in_output": True}, "abcd", "stop"),
    ({"stop": "cd", "no_stop_trim": True}, "abcd", "stop"),
    ({"max_tokens": 2}, "ab", "length"),
    ({"stop_token_ids": [20 + ord("d")]}, "abc", "stop"),
    ({}, "abcdef", "stop"),
]


@pytest.mark.parametrize(("fields", "text", "finish"), TEXTS, ids=str)
async def test_fields_that_end_the_text(
    ask: Any, fields: dict[str, Any], text: str, finish: str
) -> None:
    _, answer, _ = await ask("/v1/chat/completions", {**BODY, **fields})
    [choice] = answer["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (text, finish)
    _, answer, _ = await ask("/v1/completions", {"model": "deepseek-v3", "prompt": "x", **fields})
    [choice] = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text, finish)


def with_last(**last: Any) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", **last}]}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"store": True}, "store"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"modalities": ["text", "audio"]}, "modalities[1]"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"temperature_scale": "kelvin"}, "temperature_scale"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"messages": [{**USER, "prefix": True}]}, "messages[0].prefix"),
    (
        {"messages": [{"role": "assistant", "content": "a", "prefix": True}, USER]},
        "messages[0].prefix",
    ),
    (with_last(content=None, prefix=True), "messages[1]"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "refusal"}]}]}, "messages[0].content"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"n": 17}, "n"),
    ({"max_tokens": 2049}, "max_tokens"),
    ({"max_tokens": 8, "max_completion_tokens": 2049}, "max_completion_tokens"),
    ({"logit_bias": {"5000": 1}}, "logit_bias"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=lambda v: str(v)[:60])
async def test_fields_that_are_refused(ask: Any, fields: dict[str, Any], param: str) -> None:
    status, answer, requests = await ask("/v1/chat/completions", {**BODY, **fields})
    assert status == 400 and answer["error"]["param"] == param, answer
    assert answer["error"]["type"] == "invalid_request_error" and not requests


@pytest.mark.parametrize("root", ROOTS)
async def test_a_prefix_continues_on_every_base(ask: Any, small: Tokenizer, root: str) -> None:
    path = root + "/chat/completions"
    for body in (
        with_last(content="So ", prefix=True),
        {**with_last(content="So "), "continue_final_message": True},
    ):
        status, answer, [request] = await ask(path, {**BODY, **body})
        assert status == 200
        assert small.decode(request.prompt_ids).endswith("<｜Assistant｜>So ")
        assert answer["choices"][0]["message"]["content"] == "abcdef"  # without the prefix


async def test_developer_is_system_and_systems_are_joined(ask: Any, small: Tokenizer) -> None:
    messages = [{"role": "developer", "content": "A"}, USER, {"role": "system", "content": "B"}]
    _, _, [request] = await ask("/v1/chat/completions", {**BODY, "messages": messages})
    assert small.decode(request.prompt_ids) == (
        "<｜begin▁of▁sentence｜>A\n\nB<｜User｜>Hi<｜Assistant｜>"
    )


@pytest.mark.parametrize("root", ROOTS)
async def test_names_of_the_model(ask: Any, root: str) -> None:
    for name, expected in (("deepseek-v3", 200), ("deepseek-chat", 200), ("gpt-4", 404)):
        status, answer, _ = await ask(root + "/chat/completions", {**BODY, "model": name})
        assert status == expected
        if status == 200:
            assert answer["model"] == name
        else:
            assert answer["error"]["code"] == "model_not_found"
    status, answer, _ = await ask(root + "/completions", {"prompt": "x"})
    assert status == 400 and answer["error"]["param"] == "model"


FIM = "<｜begin▁of▁sentence｜><｜fim▁begin｜>{}<｜fim▁hole｜>{}<｜fim▁end｜>"
PROMPTS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "a", "suffix": "b"}, FIM.format("a", "b")),
    ({"prompt": "a", "suffix": ""}, FIM.format("a", "")),
    ({"suffix": "b"}, FIM.format("Once upon a time, ", "b")),
    ({"prompt": "a", "suffix": None}, "<｜begin▁of▁sentence｜>a"),
    ({}, "<｜begin▁of▁sentence｜>Once upon a time, "),
    ({"prompt": None}, "<｜begin▁of▁sentence｜>Once upon a time, "),
    ({"prompt": ""}, "<｜begin▁of▁sentence｜>"),
    ({"prompt": ["a"]}, "<｜begin▁of▁sentence｜>a"),
    ({"prompt": [117, 118]}, "ab"),
    ({"prompt": [[117]]}, "a"),
    ({"prompt": "a", "echo": False, "best_of": 1, "user": "u"}, "<｜begin▁of▁sentence｜>a"),
]


@pytest.mark.parametrize(("fields", "shown"), PROMPTS, ids=str)
async def test_prompts_of_completions(
    ask: Any, small: Tokenizer, fields: dict[str, Any], shown: str
) -> None:
    for root in ROOTS:
        status, answer, [request] = await ask(
            root + "/completions", {"model": "deepseek-v3", **fields}
        )
        assert status == 200, answer
        assert small.decode(request.prompt_ids) == shown
        assert answer["choices"][0]["text"] == "abcdef"


async def test_limits_are_the_operators(ask: Any) -> None:
    _, answer, _ = await ask("/v1/chat/completions", {**BODY, "max_tokens": 9}, max_output_tokens=8)
    assert answer["error"]["message"] == (
        "Invalid max_tokens value, the valid range of max_tokens is [1, 8]"
    )
    _, _, [request] = await ask("/v1/chat/completions", BODY, max_output_tokens=8)
    assert request.sampling.max_tokens == 8
