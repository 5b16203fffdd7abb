"""Checks of form: tool calls, JSON, errors.

A model of random weights calls no tool of its own accord, so calls are forced and short.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rayseek.serve_app.conformance import Endpoint, Json, check, require
from rayseek.serve_app.conformance_chat import (
    assistant,
    joined,
    one,
    plain,
    same_streamed,
    size,
    user,
)
from rayseek.serve_app.prompt import EMPTY_ASSISTANT, STRAY_RESULT, UNANSWERED_CALLS


def tool(name: str, **properties: Json) -> Json:
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [tool("get_weather", unit={"type": "string", "enum": ["c", "f"]}), tool("get_time")]
WEATHER = {"type": "function", "function": {"name": "get_weather"}}
ASK: Json = {"tools": TOOLS, "max_tokens": 96}


def called(*names: str) -> Json:
    """An assistant message that called functions without arguments, with ids 1, 2, ..."""
    calls = [
        {"id": str(i), "type": "function", "function": {"name": name, "arguments": "{}"}}
        for i, name in enumerate(names, 1)
    ]
    return assistant(None, tool_calls=calls)


def result(id: str, content: str = "{}") -> Json:
    return {"role": "tool", "tool_call_id": id, "content": content}


def whole_calls(choice: Json, names: Sequence[str]) -> list[Json]:
    """The calls of a plain choice, judged: of these functions, arguments an object of JSON."""
    calls: list[Json] = choice["calls"]
    require(calls and choice["finish"] in ("tool_calls", "length"), choice)
    require(len({call["id"] for call in calls}) == len(calls), calls)
    for call in calls:
        require(call["type"] == "function" and call["function"]["name"] in names, call)
        if choice["finish"] == "tool_calls":
            require(isinstance(json.loads(call["function"]["arguments"]), dict), call)
    return calls


# tools


@check("tools.declared", "Declared tools are shown to the model, with a system prompt or without.")
def _(at: Endpoint) -> None:
    bare, shown = size(at, "Hi"), size(at, "Hi", tools=TOOLS)
    require(shown > bare + 20, f"{bare} prompt tokens without tools, {shown} with two")
    system = [{"role": "system", "content": "Be brief."}, user("Hi")]
    require(size(at, system, tools=TOOLS) > size(at, system) + 20, "not with a system prompt")


@check("tools.named", "A named tool_choice calls that function with arguments by its schema.")
def _(at: Endpoint) -> None:
    choice = plain(one(at.chat("Weather?", **ASK, tool_choice=WEATHER).answer()))
    call = whole_calls(choice, ["get_weather"])[0]
    if choice["finish"] == "tool_calls":
        arguments = json.loads(call["function"]["arguments"])
        require(arguments.keys() == {"unit"} and arguments["unit"] in ("c", "f"), arguments)


@check("tools.required", "tool_choice: required calls one of the tools.")
def _(at: Endpoint) -> None:
    choice = plain(one(at.chat("Weather?", **ASK, tool_choice="required").answer()))
    whole_calls(choice, ["get_weather", "get_time"])


@check("tools.none", "tool_choice: none calls nothing.")
def _(at: Endpoint) -> None:
    choice = plain(one(at.chat("Weather?", **ASK, tool_choice="none").answer()))
    require(not choice["calls"] and choice["finish"] != "tool_calls", choice)


@check("tools.stream", "Streamed calls add up to the plain answer's; id and name come first.")
def _(at: Endpoint) -> None:
    for choice in (WEATHER, "required", "auto"):
        same_streamed(at, "Weather?", **ASK, tool_choice=choice)
    chunks = at.chat("Weather?", **ASK, tool_choice=WEATHER, stream=True).chunks()
    parts = [p for c in chunks for p in c["choices"][0]["delta"].get("tool_calls") or ()]
    first = parts[0]
    require(first["index"] == 0 and first["id"] and first["type"] == "function", first)
    require(first["function"]["name"] == "get_weather", first)
    later = [part for part in parts[1:] if part["index"] == 0]
    require(all(part["function"].keys() == {"arguments"} for part in later), later[:1])
    require(joined(chunks)["calls"][0]["function"]["arguments"], chunks)


@check("tools.single", "parallel_tool_calls: false makes at most one call.")
def _(at: Endpoint) -> None:
    body = {**ASK, "tool_choice": "required", "parallel_tool_calls": False}
    choice = plain(one(at.chat("Weather here and there?", **body).answer()))
    require(len(whole_calls(choice, ["get_weather", "get_time"])) == 1, choice)


@check("tools.round", "An answer with calls can be sent back with its results.")
def _(at: Endpoint) -> None:
    message = one(at.chat("Weather?", **ASK, tool_choice=WEATHER).answer())["message"]
    results = [result(call["id"], "18 C") for call in message["tool_calls"]]
    same_streamed(at, [user("Weather?"), message, *results], tools=TOOLS)


@check("tools.results", "Results are taken in any order, and sorted into the order of the calls.")
def _(at: Endpoint) -> None:
    asked = [user("Weather?"), called("get_weather", "get_time")]
    results = [result("1", "It rains."), result("2", "Noon.")]
    straight = at.chat([*asked, *results], tools=TOOLS).answer()
    turned = at.chat([*asked, *reversed(results)], tools=TOOLS).answer()
    require(one(straight)["message"] == one(turned)["message"], [one(straight), one(turned)])


@check("tools.order", "Calls without results and results without calls are refused as by DeepSeek.")
def _(at: Endpoint) -> None:
    call = called("get_weather", "get_time")
    for messages, text in (
        ([user("Hi"), call, result("1")], UNANSWERED_CALLS),
        ([user("Hi"), call, user("Hi")], UNANSWERED_CALLS),
        ([user("Hi"), result("1")], STRAY_RESULT),
        ([user("Hi"), assistant(None)], EMPTY_ASSISTANT),
    ):
        error = at.chat(messages, tools=TOOLS).error(400)
        require(error["message"] == text, error)


@check("tools.names", "Names have up to 64 letters, digits, _ and -; there are at most 128 tools.")
def _(at: Endpoint) -> None:
    at.chat("Hi", tools=[tool("a b")]).error(400, 422)
    at.chat("Hi", tools=[tool("a" * 65)]).error(400, 422)
    at.chat("Hi", tools=[tool(f"f{i}") for i in range(129)]).error(400, 422)


# json


def of_schema(schema: Json) -> Json:
    return {
        "type": "json_schema",
        "json_schema": {"name": "answer", "strict": True, "schema": schema},
    }


def object_of(**properties: Json) -> Json:
    parameters: Json = tool("x", **properties)["function"]["parameters"]
    return parameters


@check("json.object", "json_object gives one JSON object, streamed or not.")
def _(at: Endpoint) -> None:
    choice = same_streamed(
        at, "Answer in json.", response_format={"type": "json_object"}, max_tokens=64
    )
    text = choice["content"]
    if choice["finish"] == "stop":
        require(isinstance(json.loads(text), dict), text)
    else:
        require(text.lstrip()[:1] in ("{", ""), text)


@check("json.schema", "json_schema gives JSON of that schema, streamed or not.")
def _(at: Endpoint) -> None:
    schemas: list[tuple[Json, Any]] = [
        (object_of(ok={"type": "boolean"}), lambda v: isinstance(v["ok"], bool)),
        (object_of(hue={"enum": ["red", "grün"]}), lambda v: v["hue"] in ("red", "grün")),
    ]
    for schema, fits in schemas:
        choice = same_streamed(
            at, "Answer in json.", response_format=of_schema(schema), max_tokens=64
        )
        if choice["finish"] == "stop":
            value = json.loads(choice["content"])
            require(value.keys() == schema["properties"].keys() and fits(value), value)


@check("json.text", "response_format text changes nothing.")
def _(at: Endpoint) -> None:
    bare, text = at.chat("Hi"), at.chat("Hi", response_format={"type": "text"})
    require(one(bare.answer()) == one(text.answer()), [bare.answer(), text.answer()])


@check("json.refused", "A format that is unknown, or a schema that is none, is refused.")
def _(at: Endpoint) -> None:
    at.chat("Answer in json.", response_format={"type": "yaml"}).error(400, 422)
    at.chat("Answer in json.", response_format=of_schema({"type": "wizard"})).error(400, 422)


# errors


@check("errors.key", "A wrong key is told with 401 and OpenAI's error body.")
def _(at: Endpoint) -> None:
    reply = at.post("/v1/chat/completions", {"messages": [user("Hi")]}, key="sk-wrong-0000")
    require(reply.error(401)["type"] == "authentication_error", reply.document)


@check("errors.model", "An unknown model is refused (404, by DeepSeek 400).")
def _(at: Endpoint) -> None:
    at.chat("Hi", model="no-such-model").error(404, 400)


@check("errors.values", "A bad value is refused with 400, naming the parameter.")
def _(at: Endpoint) -> None:
    for name, value in (
        ("temperature", -0.1), ("temperature", 2.1), ("temperature", "hot"), ("temperature", True),
        ("top_p", 0), ("top_p", 1.1), ("max_tokens", 0), ("max_tokens", 10**9), ("n", 0),
        ("frequency_penalty", 3), ("presence_penalty", -3), ("logit_bias", {"-1": 1}),
        ("stop", ["x"] * 17), ("stop", ""), ("stream", "yes"), ("functions", [{"name": "f"}]),
    ):  # fmt: skip
        reply = at.chat("Hi", **{name: value})
        require(reply.status in (400, 422), f"{name}={value!r}: status {reply.status}")
        error = reply.error(400, 422)
        require(str(error["param"]).startswith(name), error)


@check("errors.messages", "Messages that are missing, empty, or of no known role are refused.")
def _(at: Endpoint) -> None:
    at.post("/v1/chat/completions", {}).error(400, 422)
    for messages in ([], [{"role": "wizard", "content": "Hi"}], [user(None)], [user(5)]):
        at.chat(messages).error(400, 422)
    at.chat([user([{"type": "image_url", "image_url": {"url": "data:,"}}])]).error(400, 422)


@check("errors.body", "A body that is not a JSON object is refused.")
def _(at: Endpoint) -> None:
    for body in (b"{", b"[]", b"null", b"\xff", b"[" * 10_000):
        at.post("/v1/chat/completions", body).error(400, 422)


@check("errors.options", "stream_options without stream is refused.")
def _(at: Endpoint) -> None:
    at.chat("Hi", stream_options={"include_usage": True}).error(400, 422)


@check("errors.paths", "An unknown path is told with 404, a wrong method with 405.")
def _(at: Endpoint) -> None:
    at.post("/v1/no/such/path", {}).error(404)
    at.get("/v1/chat/completions").error(405)


@check("errors.context", "A prompt that does not fit is refused with DeepSeek's sentence.")
def _(at: Endpoint) -> None:
    at.chat("Hi", max_tokens=1).answer()
    length = int(at.get(f"/v1/models/{at.model}").answer().get("max_model_len", 65536))
    error = at.chat("\u2603 1 a " * length).error(400)
    require("maximum context length is" in error["message"], error)
