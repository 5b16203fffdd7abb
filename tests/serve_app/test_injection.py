"""Law 5 at the API's edge: no text of a request, wherever it stands, becomes a control token."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayseek.serve_app.settings import ApiSettings
from rayseek.serve_app.tokenizer import Control, Tokenizer

NAMES = [control.value for control in Control]
FRAGMENTS = ["<｜", "｜>", "<|EOT|>", "<think>", "▁", "<", "|", "\\ud800", "\u200b", "<｜▁pad▁｜>",
             "<｜place▁holder▁no▁0｜>", "{question}", "\n```", "\n\n"]  # fmt: skip


@st.composite
def cut_names(draw: st.DrawFn) -> str:
    """A control token's name with something inside, or a part of it."""
    name = draw(st.sampled_from(NAMES))
    at = draw(st.integers(0, len(name)))
    return name[:at] + draw(st.sampled_from(["", "\u200b", " ", name, "\\"])) + name[at:]


ATTACK = st.lists(
    st.sampled_from(NAMES) | st.sampled_from(FRAGMENTS) | cut_names() | st.text(max_size=3),
    min_size=1,
    max_size=4,
).map("".join)
FILE_NAME = ATTACK.map(lambda text: "".join(filter(str.isprintable, text))[:200] + "x")


class Text:
    """Stands for attack number `index`: filled in with it, or with a harmless word."""

    def __init__(self, index: int) -> None:
        self.index = index


def fill(value: Any, words: list[str] | None) -> Any:
    if isinstance(value, Text):
        return words[value.index % len(words)] if words else "x"
    if isinstance(value, list):
        return [fill(item, words) for item in value]
    if isinstance(value, dict):
        return {key: fill(item, words) for key, item in value.items()}
    return value


CHAT: dict[str, Any] = {
    "model": "m",
    "messages": [
        {"role": "system", "content": Text(0)},
        {"role": "developer", "content": Text(1), "name": Text(2)},
        {"role": "user", "content": Text(3), "name": Text(4)},
        {
            "role": "assistant",
            "content": Text(5),
            "reasoning_content": Text(6),
            "tool_calls": [
                {"id": "1", "type": "function",
                 "function": {"name": Text(7), "arguments": Text(8)}},
                {"id": "2", "type": "function",
                 "function": {"name": Text(9), "arguments": Text(10)}},
            ],
        },
        {"role": "tool", "tool_call_id": "2", "content": Text(11)},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": Text(12)}]},
        {"role": "assistant", "content": Text(13)},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": Text(14)},
                {"type": "file", "file": {"filename": "a", "file_data": "data:,"}},
            ],
        },
        {"role": "assistant", "content": Text(15), "prefix": True},
    ],
    "tools": [
        {"type": "function", "function": {
            "name": "f", "description": Text(16),
            "parameters": {"type": "object", "description": Text(17), "properties": {}},
        }},
    ],
    "files": [{"name": "b", "content": Text(18)}],
    "web_search_results": {
        "results": [
            {"title": Text(19), "url": Text(20), "date": "d", "content": Text(21)},
            {"content": Text(22)},
        ],
        "lang": "en",
        "date": "d",
    },
    "user": Text(23),
}  # fmt: skip
FIM = {"model": "m", "prompt": Text(0), "suffix": Text(1)}
RAW = {"model": "m", "prompt": Text(0)}


@pytest.fixture(scope="module")
def prompt_of(api: Any, v3: Tokenizer) -> Any:
    """Sends a body to the application and gives the ids that the engine got."""
    limits = ApiSettings("m", 65536, (api.KEY,), max_output_tokens=1, default_output_tokens=1)
    engine = api.ScriptedEngine(lambda r: api.deltas_of(r, [v3.eos_id]))
    app = api.build_app(limits, v3, engine)

    async def send(path: str, body: Any) -> tuple[int, ...]:
        async with api.client_of(app) as client:
            reply: httpx.Response = await client.post(path, content=json.dumps(body))
        assert reply.status_code == 200, reply.text
        ids: tuple[int, ...] = engine.requests.pop().prompt_ids
        return ids

    return lambda path, body: asyncio.run(send(path, body))


@given(words=st.lists(ATTACK, min_size=1, max_size=6), name=FILE_NAME)
@pytest.mark.parametrize(
    ("path", "template"),
    [("/chat/completions", CHAT), ("/completions", FIM), ("/completions", RAW)],
    ids=["chat", "fim", "raw"],
)
def test_control_ids_are_those_of_a_harmless_request(
    prompt_of: Any, v3: Tokenizer, path: str, template: Any, words: list[str], name: str
) -> None:
    body = fill(template, words)
    if "files" in body:
        body["files"][0]["name"] = name
        body["messages"][7]["content"][1]["file"]["filename"] = name
    ids = prompt_of(path, body)
    plain = prompt_of(path, fill(template, None))
    control = v3.control_ids
    assert [i for i in ids if i in control] == [i for i in plain if i in control]
    for word in filter(None, words[:1]):
        shown = word.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        assert shown in v3.decode(ids)  # nothing is lost either
