"""Laws 1 and 4: however the tokens come, the streamed answer is the plain answer."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from rayseek.serve_app.settings import ApiSettings
from rayseek.serve_app.tokenizer import Tokenizer

LENGTH = 14
# Bytes that make and break characters and stop strings; EOS, a control token, an unknown id.
IDS = st.lists(
    st.sampled_from([*b"abab\n", *"é😀".encode(), 0x80]).map(lambda byte: 20 + byte)
    | st.sampled_from([1, 2, 312, 299]),
    min_size=1,
    max_size=LENGTH,
)
CUTS = st.just(list(range(1, LENGTH))) | st.lists(st.integers(1, LENGTH - 1), max_size=LENGTH)
OPTIONS = st.fixed_dictionaries(
    {"max_tokens": st.integers(1, LENGTH)},
    optional={
        "stop": st.lists(st.sampled_from(["ab", "bab", "é", "\n", "a"]), max_size=3),
        "include_stop_str_in_output": st.booleans(),
        "ignore_eos": st.booleans(),
        "skip_special_tokens": st.booleans(),
        "stop_token_ids": st.lists(st.just(20 + ord("\n")), max_size=1),
        "n": st.integers(1, 3),
    },
)


def expected_text(tokenizer: Tokenizer, ids: list[int], options: dict[str, Any]) -> str:
    """What the answer must say, from the whole sequence at once."""
    shown = bytearray()
    include, custom = options.get("include_stop_str_in_output"), options.get("stop_token_ids", [])
    for token_id in ids[: options["max_tokens"]]:
        ends = token_id in custom or (
            token_id == tokenizer.eos_id and not options.get("ignore_eos")
        )
        hidden = token_id in tokenizer.special_ids and options.get("skip_special_tokens", True)
        if not hidden and (not ends or (include and token_id in custom)):
            shown += tokenizer.token_bytes(token_id)
        if ends:
            break
    text = shown.decode("utf-8", "replace")
    for end in range(len(text) + 1):
        lengths = [len(s) for s in options.get("stop", []) if text[:end].endswith(s)]
        if lengths:
            return text[: end if include else end - max(lengths)]
    return text


def joined(text: str, chat: bool) -> dict[str, Any]:
    """A stream's chunks put together by a client that knows the format only."""
    frames = [frame.removeprefix("data: ") for frame in text.split("\n\n") if frame]
    assert frames.pop() == "[DONE]"
    answer: dict[str, Any] = {"choices": {}}
    for chunk in map(json.loads, frames):
        if "usage" in chunk:
            answer["usage"] = chunk["usage"]
        for part in chunk["choices"]:
            choice = answer["choices"].setdefault(
                part["index"], {"text": "", "logprobs": None, "finish_reason": None}
            )
            assert choice["finish_reason"] is None, "a chunk after the last"
            choice["text"] += part["delta"]["content"] if chat else part["text"]
            choice["finish_reason"] = part["finish_reason"]
            if part["logprobs"] is not None:
                lists = choice["logprobs"] = choice["logprobs"] or {}
                for name, values in part["logprobs"].items():
                    lists[name] = lists.get(name, []) + values
    return answer


@given(ids=IDS, cuts=CUTS, options=OPTIONS, logprobs=st.booleans(), chat=st.booleans(),
       cached=st.integers(0, 5))  # fmt: skip
@hypothesis_settings(max_examples=300)
def test_stream_law(
    api: Any, small: Tokenizer, settings: ApiSettings, ids: list[int], cuts: list[int],
    options: dict[str, Any], logprobs: bool, chat: bool, cached: int,
) -> None:  # fmt: skip
    body: dict[str, Any] = {"model": "deepseek-v3", **options}
    if chat:
        path = "/v1/chat/completions"
        body |= {"messages": [{"role": "user", "content": "Hi"}], "logprobs": logprobs}
        if logprobs:
            body["top_logprobs"] = 1
    else:
        path = "/v1/completions"
        body |= {"prompt": "Hi", **({"logprobs": 1} if logprobs else {})}

    async def ask(script: Any, stream: bool) -> Any:
        engine = api.ScriptedEngine(script)
        async with api.client_of(api.build_app(settings, small, engine)) as client:
            reply = await client.post(path, json={**body, "stream": stream})
        assert reply.status_code == 200, reply.text
        assert engine.live == 0
        return joined(reply.text, chat) if stream else reply.json()

    def cached_of(request: Any) -> int:
        return min(cached, len(request.prompt_ids))

    whole = asyncio.run(ask(lambda r: api.deltas_of(r, ids, cached=cached_of(r)), False))
    stream = asyncio.run(ask(lambda r: api.deltas_of(r, ids, cuts, cached=cached_of(r)), True))
    usage = whole["usage"]
    assert stream["usage"] == usage
    assert usage["prompt_cache_hit_tokens"] == usage["prompt_tokens_details"]["cached_tokens"]
    assert (
        usage["prompt_cache_hit_tokens"] + usage["prompt_cache_miss_tokens"]
        == usage["prompt_tokens"]
    )
    assert len(whole["choices"]) == len(stream["choices"]) == options.get("n", 1)
    expected = expected_text(small, ids, options)
    counted = 0
    for choice in whole["choices"]:
        other = stream["choices"][choice["index"]]
        text = choice["message"]["content"] if chat else choice["text"]
        assert other["text"] == text == expected
        assert other["finish_reason"] == choice["finish_reason"] in ("stop", "length")
        if logprobs:
            entries = choice["logprobs"]["content" if chat else "tokens"]
            counted += len(entries)
            assert choice["logprobs"] == (other["logprobs"] or {k: [] for k in choice["logprobs"]})
    drafts = usage["completion_tokens_details"]
    assert sum(drafts.values()) <= usage["completion_tokens"]
    if logprobs:  # every counted token is reported, and no other
        assert counted == usage["completion_tokens"]
