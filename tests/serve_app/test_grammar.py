"""From a request to the grammar of its answer, and what a random model says under it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayseek.cluster.engine import Engine
from rayseek.cluster.grammar import grammar_vocabulary, new_matcher
from rayseek.cluster.request import Delta, Request
from rayseek.serve_app import grammar as form_of_answers
from rayseek.serve_app.errors import ApiError
from rayseek.serve_app.grammar import grammar_of
from rayseek.serve_app.prompt import JSON_MODE
from rayseek.serve_app.protocol import ChatRequest, parse
from rayseek.serve_app.settings import ApiSettings
from rayseek.serve_app.tokenizer import Control, Tokenizer

USER = [{"role": "user", "content": "x"}]
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "unit": {"enum": ["c", "f"]}},
    "required": ["city"],
    "additionalProperties": False,
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}


def tool(name: str, parameters: Any = None, **changes: Any) -> dict[str, Any]:
    function = {"name": name, "parameters": parameters or CITY, **changes}
    return {"type": "function", "function": function}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def schema_format(schema: Any, **changes: Any) -> dict[str, Any]:
    wanted = {"name": "answer", "schema": schema, "strict": True, **changes}
    return {"type": "json_schema", "json_schema": wanted}


def chat(**fields: Any) -> ChatRequest:
    return parse(ChatRequest, {"model": "deepseek-v3", "messages": USER, **fields})


def grammar(tokenizer: Tokenizer, **fields: Any) -> str:
    return asyncio.run(grammar_of(chat(**fields), tokenizer))


# ---- which answers a grammar takes: V3's own tokens ----


@pytest.fixture(scope="module")
def v3_takes(v3: Tokenizer, v3_file: Path) -> Callable[..., bool]:
    """Whether the grammar of a request takes an answer, given as ids or text, and can end there."""
    vocabulary = grammar_vocabulary(v3_file.parent, 129280, 1)

    def takes(answer: str | list[int], **fields: Any) -> bool:
        ids = v3.encode_text(answer) if isinstance(answer, str) else answer
        ids = ids[:-1] if ids[-1:] == [v3.eos_id] else ids
        matcher = new_matcher(vocabulary, grammar(v3, **fields))
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    return takes


TOOLS = [
    tool("get_weather", {"type": "object"}, strict=True),
    tool("get_time", {"type": "object"}, strict=True),
]


def vector(vectors: dict[str, Any], name: str) -> list[int]:
    (ids,) = (v["ids"] for v in vectors["tool_parse"] if v["id"] == name)
    return list(ids)


def names_in(vectors: dict[str, Any], name: str) -> list[str]:
    (raw,) = (v["raw"] for v in vectors["tool_parse"] if v["id"] == name)
    parts = raw.split("function" + Control.TOOL_SEP.value)[1:]
    return sorted({part.split("\n")[0] for part in parts})


@pytest.mark.parametrize("name", ["T1", "T2", "T3", "T4", "T8", "T9"])
def test_what_v3_writes_is_taken(
    v3_takes: Callable[..., bool], vectors: dict[str, Any], name: str
) -> None:
    """The recorded outputs of section 5.7, token for token."""
    ids = vector(vectors, name)
    tools = [tool(n, {"type": "object"}, strict=True) for n in ["other", *names_in(vectors, name)]]
    assert v3_takes(ids, tools=tools)
    calls_only = ids[0] == 128806
    assert v3_takes(ids, tools=tools, tool_choice="required") == calls_only
    both = {"tools": tools, "response_format": {"type": "json_object"}}
    assert v3_takes(ids, **both) == calls_only
    count = ids.count(128808)
    assert v3_takes(ids, tools=tools, parallel_tool_calls=False) == (count <= 1)


@pytest.mark.parametrize("name", ["T5", "T6", "T7"])
def test_what_v3_should_not_write_is_not_taken(
    v3_takes: Callable[..., bool], vectors: dict[str, Any], name: str
) -> None:
    """A mark inside arguments, no end of the calls, a cut call."""
    tools = [tool(n, {"type": "object"}, strict=True) for n in names_in(vectors, name)]
    assert not v3_takes(vector(vectors, name), tools=tools)


def test_a_named_choice_takes_that_call_once(
    v3_takes: Callable[..., bool], vectors: dict[str, Any]
) -> None:
    one = vector(vectors, "T1")
    assert v3_takes(one, tools=TOOLS, tool_choice=named("get_weather"))
    assert not v3_takes(one, tools=TOOLS, tool_choice=named("get_time"))
    twice = [*one[:-2], 201, *one[1:]]
    assert v3_takes(twice, tools=TOOLS, tool_choice="required")
    assert not v3_takes(twice, tools=TOOLS, tool_choice=named("get_weather"))
    assert not v3_takes(twice, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)


@pytest.mark.parametrize(
    ("answer", "taken"),
    [
        ('{"a": 1}', True),
        ('{\n  "a": [1, 2.5e3, null, "é😀\\n"],\n  "b": {"c": {}}\n}', True),
        ("{}", True),
        ("[1]", False),
        ('"text"', False),
        ('{"a": 1', False),
        ('```json\n{"a": 1}\n```', False),
        ('{"a":' + " " * 64 + "1}", False),
        ('{"a":\n\n\n\n1}', False),
        ('{"\\u0061": 1}', False),
        ("Here it is: {}", False),
    ],
)
def test_json_object(v3_takes: Callable[..., bool], answer: str, taken: bool) -> None:
    assert v3_takes(answer, response_format={"type": "json_object"}) == taken


@pytest.mark.parametrize(
    ("answer", "taken"),
    [
        ('{"city": "Paris", "unit": "c"}', True),
        ('{"city":"北京"}', True),
        ("{}", False),
        ('{"city": "Paris", "x": 1}', False),
        ('{"city": "Paris", "unit": "k"}', False),
        ('{"city": "Paris, France"}', False),
        ('{"city": "Paris", "c\\u0069ty": 1}', False),
    ],
)
def test_json_schema(v3_takes: Callable[..., bool], answer: str, taken: bool) -> None:
    assert v3_takes(answer, response_format=schema_format(CITY)) == taken
    assert v3_takes(answer, response_format=schema_format(CITY, strict=False)) == taken


def test_a_declared_key_cannot_be_written_as_an_additional_one(
    v3_takes: Callable[..., bool],
) -> None:
    """Neither twice nor with an escape: the later value would win, of any type."""
    open_ended = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    wanted = schema_format(open_ended)
    assert v3_takes('{"a": 1, "b": "x"}', response_format=wanted)
    assert not v3_takes('{"a": 1, "a": "x"}', response_format=wanted)
    assert not v3_takes('{"a": 1, "\\u0061": "x"}', response_format=wanted)


def test_without_strict_unknown_keywords_are_not_enforced(
    v3_takes: Callable[..., bool], v3: Tokenizer
) -> None:
    odd = {"type": "object", "properties": {"a": {"not": {"type": "null"}}}, "required": ["a"]}
    assert v3_takes('{"a": null}', response_format=schema_format(odd, strict=False))
    assert not v3_takes("{}", response_format=schema_format(odd, strict=None))
    with pytest.raises(ApiError, match="Unimplemented keys"):
        grammar(v3, response_format=schema_format(odd))


def test_a_useless_schema_of_a_tool_that_is_not_strict_means_any_object(
    v3_takes: Callable[..., bool], vectors: dict[str, Any]
) -> None:
    odd = {"type": "object", "properties": {"city": {"type": "string", "pattern": "(?=P)"}}}
    assert v3_takes(vector(vectors, "T1"), tools=[tool("get_weather", odd)], tool_choice="required")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"response_format": {"type": "text"}},
        {"tools": [tool("f")]},
        {"tools": [tool("f", strict=False)], "tool_choice": "auto", "parallel_tool_calls": False},
        {"tools": [tool("f", strict=True)], "tool_choice": "none"},
    ],
)
def test_a_free_answer_has_no_grammar(small: Tokenizer, fields: dict[str, Any]) -> None:
    assert grammar(small, **fields) == ""


# ---- what is refused ----


def nested(depth: int, schema: Any = True) -> dict[str, Any]:
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return dict(schema)


WORD = {"type": "string"}
HOSTILE = {
    "huge enum": {"enum": [f"value {i}" for i in range(40_000)]},
    "deep": nested(300),
    "deeper than JSON parsers go": nested(20_000),
    "wide": {"type": "object", "properties": {f"p{i}": WORD for i in range(3000)}},
    "blow-up": {"allOf": [{"anyOf": [nested(1, {"enum": [i, j]}) for j in range(4)]}
                          for i in range(9)]},
    "exponential pattern": {**WORD, "pattern": "^(([a-z]{1,100}){1,100}){1,100}$"},
    "look-around": {**WORD, "pattern": "^(?=a)b$"},
    "back-reference": {**WORD, "pattern": r"^(a)\1$"},
    "broken pattern": {**WORD, "pattern": "("},
    "parentheses": {**WORD, "pattern": "(" * 5000 + ")" * 5000},
    "remote reference": {"$ref": "http://169.254.169.254/latest"},
    "file reference": {"$ref": "file:///etc/passwd"},
    "reference to itself": {"$ref": "#"},
    "circle": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    "reference to nothing": {"$ref": "#/$defs/a"},
    "not": {"not": WORD},
    "if": {"if": WORD, "then": {"minLength": 2}},
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "contains": {"type": "array", "contains": WORD},
    "minProperties": {"type": "object", "minProperties": 2},
    "unknown format": {**WORD, "format": "iban"},
    "unknown type": {"type": "text"},
    "overlapping oneOf": {"oneOf": [WORD, {**WORD, "minLength": 2}]},
    "contradiction": {"type": "integer", "minimum": 5, "maximum": 3},
    "far too large a number": {"type": "integer", "minimum": -(10**400)},
    "a way out of our options": {"x-guidance": {"lenient": True}, "not": WORD},
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
async def test_hostile_schemas_are_400_and_touch_nobody(
    api: Any, settings: ApiSettings, small: Tokenizer, kind: str
) -> None:
    """Law 6, and which parameter was at fault."""
    engine = api.saying(small)
    schema = {"type": "object", "properties": {"x": HOSTILE[kind]}}
    if "$defs" in HOSTILE[kind]:
        schema["$defs"] = HOSTILE[kind]["$defs"]
    if kind == "reference to itself":
        schema = HOSTILE[kind]
    bodies = [
        ({"response_format": schema_format({**schema, "required": ["x"]})}, "response_format"),
        ({"tools": [tool("f"), tool("g", {**schema, "required": ["x"]}, strict=True)]}, "tools[1]"),
    ]
    async with api.client_of(api.build_app(settings, small, engine)) as client:
        for fields, param in bodies:
            try:
                content = json.dumps({"model": "deepseek-v3", "messages": USER, **fields})
            except RecursionError:
                deep = '{"properties":{"a":' * 20_000 + "{}" + "}}" * 20_000
                content = json.dumps(
                    {"model": "deepseek-v3", "messages": USER,
                     "response_format": schema_format("DEEP")}
                ).replace('"DEEP"', deep)  # fmt: skip
            bad, good = await asyncio.gather(
                client.post("/v1/chat/completions", content=content),
                client.post("/v1/chat/completions",
                            json={"model": "deepseek-v3", "messages": USER}),
            )  # fmt: skip
            assert bad.status_code == 400, bad.text
            # What is too deep for a JSON parser has no parameter yet.
            assert bad.json()["error"]["param"] in (param, None), bad.text
            assert len(bad.text) < 1000
            assert good.status_code == 200
    assert len(engine.requests) == 2


def test_who_waits_for_others_trials_is_told_to_come_again(
    small: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, free = threading.Semaphore(0), threading.Event()

    def busy() -> None:
        began.release()
        free.wait()

    monkeypatch.setattr(form_of_answers, "TRIAL_SECONDS", 0.05)
    others = [form_of_answers._trials.submit(busy) for _ in range(2)]
    try:
        for _ in others:
            began.acquire()
        with pytest.raises(ApiError) as told:
            grammar(small, response_format=schema_format({**CITY, "title": "others first"}))
    finally:
        free.set()
    assert told.value.status == 503 and told.value.headers["Retry-After"] == "1"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": named("f")}, "tool_choice"),
        ({"tools": [tool("f")], "tool_choice": named("g")}, "tool_choice"),
        ({"tools": [tool("f")], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"tools": [tool("f")], "tool_choice": 1}, "tool_choice"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {
                "response_format": {"type": "json_object"},
                "messages": [*USER, {"role": "assistant", "content": "{", "prefix": True}],
            },
            "response_format",
        ),
        (
            {
                "tools": [
                    tool(f"f{i}", nested(1, {"enum": [str(i) * 50_000]}), strict=True)
                    for i in range(8)
                ]
            },
            "tools",
        ),
    ],
)
def test_what_cannot_be_bound_names_its_parameter(
    small: Tokenizer, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(ApiError) as error:
        grammar(small, **fields)
    assert (error.value.status, error.value.param) == (400, param)


# ---- whole requests on random weights ----


class InProcess:
    """The engine behind the HTTP side's port, without threads or network."""

    fingerprint = "fp_in_process"

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.prompts: list[tuple[int, ...]] = []

    async def generate(self, request: Request) -> AsyncIterator[Delta]:
        self.prompts.append(request.prompt_ids)
        self.engine.submit(request)
        try:
            while True:
                for delta in self.engine.step():
                    yield delta
                    if delta.finish:
                        return
        finally:
            self.engine.cancel(request.id)


@pytest.fixture(scope="module")
def tiny(tiny_path: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(tiny_path)


@pytest.fixture
def post(
    api: Any, tiny: Tokenizer, make_engine: Callable[..., Engine]
) -> Callable[..., dict[str, Any]]:
    settings = ApiSettings(model="deepseek-v3", context_length=1024, api_keys=(api.KEY,))
    engine = InProcess(make_engine())

    def send(**fields: Any) -> dict[str, Any]:
        async def go() -> httpx.Response:
            async with api.client_of(api.build_app(settings, tiny, engine)) as client:
                body = {"model": "deepseek-v3", "messages": USER, "max_tokens": 400, **fields}
                return await client.post("/v1/chat/completions", json=body)

        response = asyncio.run(go())
        assert response.status_code == 200, response.text
        choice: dict[str, Any] = response.json()["choices"][0]
        return {**choice, "prompt": engine.prompts[-1]}

    return send


FEW = settings(max_examples=15)
CALLS = [tool("get_weather"), tool("now", NOTHING), tool("get-time_2", None, strict=True)]


@FEW
@given(st.integers(0, 2**32), st.floats(0, 2), st.sampled_from([None, True, False]), st.data())
def test_a_forced_choice_always_calls(
    post: Callable[..., dict[str, Any]], seed: int, temperature: float, parallel: bool | None,
    data: st.DataObject,
) -> None:  # fmt: skip
    names = [call["function"]["name"] for call in CALLS]
    wanted = data.draw(st.sampled_from(["required", *names]))
    choice = wanted if wanted == "required" else named(wanted)
    got = post(tools=CALLS, tool_choice=choice, seed=seed, temperature=temperature,
               parallel_tool_calls=parallel, logit_bias={"1": 100})  # fmt: skip
    calls = got["message"]["tool_calls"]
    assert not got["message"]["content"]
    if wanted != "required" or parallel is False:
        assert len(calls) == 1
    for number, call in enumerate(calls):
        name = call["function"]["name"]
        assert name in (names if wanted == "required" else [wanted])
        if got["finish_reason"] == "tool_calls" or number < len(calls) - 1:
            arguments = json.loads(call["function"]["arguments"])
            assert set(arguments) <= {"city", "unit"} and ("city" in arguments) == (name != "now")
    assert got["finish_reason"] == "tool_calls" or len(calls) > 1


@FEW
@given(st.integers(0, 2**32), st.booleans())
def test_json_or_calls(
    post: Callable[..., dict[str, Any]], tiny: Tokenizer, seed: int, favour_calls: bool
) -> None:
    """With a response format and tools, an answer is one or the other, and never free text."""
    mark = tiny.id_of(Control.CALLS_BEGIN)
    got = post(tools=CALLS, response_format=schema_format(CITY), seed=seed,
               logit_bias={str(mark): 100 if favour_calls else -100})  # fmt: skip
    if favour_calls:
        assert got["message"]["tool_calls"] and not got["message"]["content"]
    else:
        assert json.loads(got["message"]["content"])["city"] is not None
        assert got["finish_reason"] == "stop"


def test_the_prompt_asks_for_json_only_where_it_may_come(
    post: Callable[..., dict[str, Any]], tiny: Tokenizer
) -> None:
    for expected, fields in [
        (True, {"response_format": {"type": "json_object"}}),
        (True, {"response_format": schema_format(CITY), "tools": CALLS}),
        (False, {"response_format": {"type": "text"}}),
        (False, {"response_format": {"type": "json_object"}, "tools": CALLS,
                 "tool_choice": "required"}),
    ]:  # fmt: skip
        prompt = tiny.decode(post(**fields, max_tokens=5)["prompt"])
        assert (JSON_MODE in prompt) == expected


def test_a_cut_answer_is_cut_json(post: Callable[..., dict[str, Any]]) -> None:
    whole = post(response_format=schema_format(CITY), seed=3)
    cut = post(response_format=schema_format(CITY), seed=3, max_tokens=4)
    assert cut["finish_reason"] == "length"
    assert whole["message"]["content"].startswith(cut["message"]["content"])
