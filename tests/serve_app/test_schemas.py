"""Answers of random weights to random schemas: whatever finishes is valid."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import jsonschema

from rayseek.cluster.engine import Engine, run_to_end
from rayseek.cluster.request import Delta, FinishReason, Request, SamplingParams
from rayseek.serve_app.grammar import grammar_of
from rayseek.serve_app.protocol import ChatRequest, parse
from rayseek.serve_app.tokenizer import Tokenizer

SCHEMAS = 48
CHECKED_FORMATS = ("email", "uuid", "ipv4", "ipv6")  # those that jsonschema knows as the RFCs do

KEYS = ["a", "name", "城市", "clé", "пример", 'quo"te', "back\\slash", "with space", "😀", "$ref",
        "", "x-1", "Z9", "new\nline", "a/b"]  # fmt: skip
PATTERNS = ["^[a-z]{1,6}$", "^(a|b)+c?$", r"^\d{2}-\d{2}$", "[0-9]", "^[^x]{0,5}$", "^é?ü{1,2}$",
            "^[一-龥]{1,3}$", r"^\w{1,4}@\w+$"]  # fmt: skip
FORMATS = ["email", "uuid", "ipv4", "ipv6", "date-time", "time", "duration"]
VALUES: list[Any] = [None, True, 0, -7, 2.5, "", "word", "北京", 'a"b', [1, "x"], {"k": [None]}]


def strictly(schema: dict[str, Any]) -> ChatRequest:
    wanted = {"name": "answer", "schema": schema, "strict": True}
    return parse(
        ChatRequest,
        {
            "model": "m",
            "messages": [{"role": "user", "content": "x"}],
            "response_format": {"type": "json_schema", "json_schema": wanted},
        },
    )


def test_every_finished_answer_is_valid(
    make_engine: Callable[..., Engine], tiny_path: Path
) -> None:
    """Judged by the `jsonschema` package. A truncated answer is the beginning of some JSON."""
    tokenizer = Tokenizer.from_pretrained(tiny_path)
    schemas = [random_schema(Random(seed)) for seed in range(SCHEMAS)]
    engine = make_engine(pages=256)
    for number, schema in enumerate(schemas):
        params = SamplingParams(
            max_tokens=500, temperature=[0.7, 1.0, 1.5][number % 3], seed=number,
            stop_token_ids=(tokenizer.eos_id,),
        )  # fmt: skip
        grammar = asyncio.run(grammar_of(strictly(schema), tokenizer))
        engine.submit(Request(str(number), (0, 5, number + 9), params, grammar=grammar))
    deltas: dict[str, list[Delta]] = defaultdict(list)
    run_to_end(engine, lambda delta: deltas[delta.request_id].append(delta))

    finished = 0
    formats = jsonschema.FormatChecker(CHECKED_FORMATS)
    for number, schema in enumerate(schemas):
        last = deltas[str(number)][-1]
        assert last.finish is not FinishReason.ERROR, (last.error, schema)
        ids = [token.id for delta in deltas[str(number)] for token in delta.tokens]
        text = tokenizer.decode(i for i in ids if i != tokenizer.eos_id)
        if last.finish is FinishReason.STOP:
            finished += 1
            validator = jsonschema.Draft202012Validator(schema, format_checker=formats)
            validator.validate(json.loads(text))
        else:
            assert text.startswith("{")
    assert finished > SCHEMAS / 2


def random_schema(rng: Random) -> dict[str, Any]:
    """A schema with an object at the top, most of which a short answer satisfies."""
    definitions: dict[str, Any] = {}
    schema = _object(rng, 3, definitions)
    if definitions:
        schema["$defs"] = definitions
    return schema


def _any(rng: Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    kinds = [_string, _number, _integer, _enum, _const, _flag]
    if depth:
        kinds += [_object, _object, _array, _union, _recursive, _merged]
    return rng.choice(kinds)(rng, depth, definitions)


def _object(rng: Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    keys = rng.sample(KEYS, rng.randint(1, 4))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {key: _any(rng, depth - 1, definitions) for key in keys},
        "required": rng.sample(keys, rng.randint(0, len(keys))),
    }
    match rng.randint(0, 7):
        case 0:
            schema["additionalProperties"] = _any(rng, 0, definitions)
        case 1:
            schema["patternProperties"] = {"^p": _any(rng, 0, definitions)}
            schema["additionalProperties"] = False
        case _:
            schema["additionalProperties"] = False
    return schema


def _array(rng: Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    least = rng.randint(0, 2)
    schema = {"type": "array", "minItems": least, "maxItems": least + rng.randint(0, 2)}
    if rng.random() < 0.3:
        schema["prefixItems"] = [_any(rng, depth - 1, definitions) for _ in range(2)]
    return {**schema, "items": _any(rng, depth - 1, definitions)}


def _union(rng: Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [_any(rng, depth - 1, definitions) for _ in range(rng.randint(2, 3))]}


def _merged(rng: Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    parts = [
        {"type": "object", "properties": {key: _any(rng, 0, definitions)}, "required": [key]}
        for key in rng.sample(KEYS, 2)
    ]
    return {"allOf": parts}


def _recursive(rng: Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    name = f"node{len(definitions)}"
    link = {"anyOf": [{"$ref": f"#/$defs/{name}"}, {"type": "null"}]}
    definitions[name] = {}
    definitions[name] = {
        "type": "object",
        "properties": {"value": _any(rng, 0, definitions), "next": link},
        "required": ["value", "next"],
        "additionalProperties": False,
    }
    return {"$ref": f"#/$defs/{name}"}


def _string(rng: Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    match rng.randint(0, 3):
        case 0:
            return {"type": "string", "pattern": rng.choice(PATTERNS), "maxLength": 30}
        case 1:
            return {"type": "string", "format": rng.choice(FORMATS)}
        case _:
            least = rng.randint(0, 3)
            return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 8)}


def _number(rng: Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    low = rng.choice([-3.5, 0, 0.25])
    bounds = [{"minimum": low, "maximum": low + 10}, {"exclusiveMinimum": low, "maximum": 100.5}]
    return {"type": "number", **rng.choice(bounds)}


def _integer(rng: Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    low = rng.randint(-1000, 1000)
    bounds = [
        {"minimum": low, "maximum": low + rng.randint(1, 5000)},
        {"exclusiveMinimum": low, "exclusiveMaximum": low + 50},
        {"multipleOf": rng.choice([2, 7, 10]), "minimum": 0, "maximum": 1000},
    ]
    return {"type": "integer", **rng.choice(bounds)}


def _enum(rng: Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    return {"enum": rng.sample(VALUES, rng.randint(1, 5))}


def _const(rng: Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    return {"const": rng.choice(VALUES)}


def _flag(rng: Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    return {"type": rng.choice(["boolean", "null", ["boolean", "null"]])}
