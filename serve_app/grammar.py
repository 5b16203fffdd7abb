"""The form an answer must have, as a grammar: JSON, a schema, tool calls (spec 5.3, 5.7, 6.5).

`plan_of` reads from a request what is bound, `grammar_text` writes it in llguidance's language,
both pure. `grammar_of` does both and tries every schema in between, beside the event loop, so
that one which cannot be kept is a 400 that says why.

Choices the specification leaves open:
- DeepSeek refuses json_object without the word "json" in the prompt, for fear of endless blanks.
  Here the prompt says it (`render_chat(json_mode=True)`) and the grammar has no room for blanks.
- Without `strict`, keywords that the grammar does not know are not enforced, and a tool whose
  schema is of no use at all may be called with any object.
- A response format binds what the model says; a tool call instead of it is still possible.
"""

from __future__ import annotations

import asyncio
import json
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from llguidance import LLTokenizer, TokenizerWrapper

from rayseek.cluster.grammar import MAX_GRAMMAR_BYTES, GrammarError, new_matcher, reason
from rayseek.serve_app.errors import ApiError, bad_request, overloaded
from rayseek.serve_app.protocol import ChatRequest
from rayseek.serve_app.tokenizer import Control, Tokenizer

TRIAL_SECONDS = 5.0
TRIAL_BYTES = 24  # some limits show only after a few bytes of an answer
# Few blanks, so that no model can fill its answer with them. No \u escapes: with them a key could
# be written in two ways, and an additional key would pass for a declared one.
WRITING = {
    "whitespace_pattern": r"[ \t]{1,2}|\n[ \t]{0,32}",
    "json_allowed_escapes": '"\\bfnrt',
}
ANY_OBJECT: dict[str, Any] = {"type": "object"}
CHOICES = (
    'tool_choice must be "none", "auto", "required" or '
    '{"type": "function", "function": {"name": ...}}'
)
_trials = ThreadPoolExecutor(2, "schema")


@dataclass(frozen=True, slots=True)
class Form:
    """A JSON schema in llguidance's terms. `param`: the request's field it came from.

    `replaceable`: the caller did not insist; any object will do when the schema is of no use.
    """

    param: str
    schema: str
    replaceable: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """What may be said. `answer`: JSON instead of free text; `tools`: what may be called."""

    answer: Form | None
    tools: tuple[tuple[str, Form], ...]
    must_call: bool
    one_call: bool


def plan_of(body: ChatRequest) -> Plan | None:
    """None: nothing is bound. Raises ApiError (400)."""
    must_call, callable_ = _callable(body)
    answer = None if must_call else _answer_form(body)
    tools = [(index, (body.tools or ())[index].function) for index in callable_]
    if not (must_call or answer or any(function.strict for _, function in tools)):
        return None
    forms = tuple((f.name, _tool_form(i, f.parameters, bool(f.strict))) for i, f in tools)
    named = isinstance(body.tool_choice, dict)
    return Plan(answer, forms, must_call, named or body.parallel_tool_calls is False)


def wants_json(body: ChatRequest) -> bool:
    """Whether the prompt should ask for JSON."""
    bound = body.response_format is not None and body.response_format.type != "text"
    return bound and body.tool_choice in (None, "auto", "none")


def grammar_text(plan: Plan, tokenizer: Tokenizer) -> str:
    """The grammar, with call markup as rule 4 of section 5.3 has it, control tokens by id."""

    def mark(control: Control) -> str:
        return f"<[{tokenizer.id_of(control)}]>"

    rules: list[str] = []
    if plan.must_call:
        start = "calls"
    elif plan.answer:
        start = "answer | calls" if plan.tools else "answer"
        rules.append(f"answer: %json {plan.answer.schema}")
    else:
        start = "TEXT? calls?"
        rules.append(r"TEXT: /(.|\n)+/")
    if plan.tools:
        more = "" if plan.one_call else r'("\n" call)*'
        names = " | ".join(f"tool{number}" for number in range(len(plan.tools)))
        rules += [
            f"calls: {mark(Control.CALLS_BEGIN)} call {more} {mark(Control.CALLS_END)}",
            f'call: {mark(Control.CALL_BEGIN)} "function" {mark(Control.TOOL_SEP)} '
            rf'({names}) "\n```" {mark(Control.CALL_END)}',
        ]
    for number, (name, form) in enumerate(plan.tools):
        rules.append(rf'tool{number}: "{name}\n```json\n" arguments{number}')
        rules.append(f"arguments{number}: %json {form.schema}")
    return "\n".join([f"start: {start}", *rules, ""])


async def grammar_of(body: ChatRequest, tokenizer: Tokenizer) -> str:
    """The grammar of the answer, "" if it is free. Raises ApiError (400)."""
    plan = plan_of(body)
    if plan is None:
        return ""
    answer = plan.answer and await _tried(plan.answer)
    tools = [(name, await _tried(form)) for name, form in plan.tools]
    text = grammar_text(replace(plan, answer=answer, tools=tuple(tools)), tokenizer)
    if len(text) > MAX_GRAMMAR_BYTES:
        raise bad_request(
            f"the schemas of this request have {len(text)} bytes together; at most "
            f"{MAX_GRAMMAR_BYTES} can be enforced",
            param="tools",
        )
    return text


def _callable(body: ChatRequest) -> tuple[bool, list[int]]:
    """Whether a call is a must, and the indexes of the tools it may name."""
    tools, choice = body.tools or [], body.tool_choice
    match choice:
        case None | "auto":
            return False, list(range(len(tools)))
        case "none":
            return False, []
        case "required" if tools:
            return True, list(range(len(tools)))
        case {"type": "function", "function": {"name": str(name)}}:
            found = [i for i, tool in enumerate(tools) if tool.function.name == name]
            if found:
                return True, found[:1]
            raise bad_request(f"tool_choice: no tool named {name!r:.80}", param="tool_choice")
    raise bad_request(
        "tool_choice 'required' needs tools" if choice == "required" else CHOICES,
        param="tool_choice",
    )


def _answer_form(body: ChatRequest) -> Form | None:
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if body.continue_final_message or body.messages[-1].prefix:
        raise bad_request(
            "response_format cannot bind an answer that goes on from a prefix; drop one of the two",
            param="response_format",
        )
    if wanted.type == "json_object":
        return Form("response_format", _written(ANY_OBJECT, "response_format", strict=True))
    if wanted.json_schema is None:
        param = "response_format.json_schema"
        raise bad_request(f"{param}: Field required", param=param)
    schema, strict = wanted.json_schema.schema_, bool(wanted.json_schema.strict)
    schema = ANY_OBJECT if schema is None else schema
    return Form("response_format", _written(schema, "response_format", strict=strict))


def _tool_form(index: int, parameters: dict[str, Any] | None, strict: bool) -> Form:
    """Arguments are an object, whatever the schema forgets to say."""
    param = f"tools[{index}]"
    if parameters is None:
        parameters = {"additionalProperties": False} if strict else {}
    schema = {**parameters, "type": "object"}
    return Form(param, _written(schema, param, strict=strict), replaceable=not strict)


def _written(schema: dict[str, Any], param: str, *, strict: bool) -> str:
    """The schema as JSON text with our way of writing; `strict`: unknown keywords are errors."""
    options = {**WRITING, "lenient": not strict, "coerce_one_of": not strict}
    try:
        text = json.dumps({**schema, "x-guidance": options})
        if len(text) > MAX_GRAMMAR_BYTES:
            raise _unusable(param, f"it has {len(text)} bytes; {MAX_GRAMMAR_BYTES} are allowed")
        if strict and _counts_properties(schema):
            # Keys may come twice in an answer, and then count once.
            raise _unusable(param, "minProperties above the number of required keys")
    except RecursionError:
        raise _unusable(param, "it is nested too deeply") from None
    return text


def _counts_properties(schema: object) -> bool:
    if isinstance(schema, list):
        return any(map(_counts_properties, schema))
    if not isinstance(schema, dict):
        return False
    least, required = schema.get("minProperties"), schema.get("required")
    sure = len(required) if isinstance(required, list) else 0
    return (type(least) is int and least > max(sure, 1)) or any(
        map(_counts_properties, schema.values())
    )


def _unusable(param: str, why: str) -> ApiError:
    return bad_request(f"{param}: this schema cannot be enforced: {why}", param=param)


async def _tried(form: Form) -> Form:
    """The form, or what replaces it. Raises ApiError when it cannot be kept, or when others' trials
    leave no time for its own."""
    trial = _trials.submit(complaint, form.schema)
    try:
        problem = await asyncio.wait_for(asyncio.wrap_future(trial), TRIAL_SECONDS)
    except TimeoutError:
        if trial.cancel():  # it had not begun
            raise overloaded("other schemas are being tried; try again later", 1.0) from None
        problem = f"compiling it takes more than {TRIAL_SECONDS:.0f} s"
    if problem is None:
        return form
    if form.replaceable:
        return replace(form, schema=_written(ANY_OBJECT, form.param, strict=True))
    raise _unusable(form.param, problem)


@lru_cache(maxsize=128)
def complaint(schema: str) -> str | None:
    """Why answers cannot be held to this schema, or None: it compiles, and an answer can begin."""
    try:
        matcher = new_matcher(_bytes_vocabulary(), f"start: value\nvalue: %json {schema}\n")
    except GrammarError as error:
        return str(error)
    dice = random.Random(0)
    for _ in range(TRIAL_BYTES):
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits)
        if matcher.is_error() or not len(allowed):
            return reason(matcher) or "nothing satisfies it"
        if not matcher.consume_token(int(dice.choice(allowed))):
            return reason(matcher)
        if matcher.is_stopped():
            return None
    return None


class _Bytes:
    """Every byte is a token: enough to try a schema without the model's vocabulary."""

    eos_token_id, bos_token_id = 256, None
    tokens = [*(bytes([byte]) for byte in range(256)), b"<end>"]
    special_token_ids = [256]

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


@lru_cache(maxsize=1)
def _bytes_vocabulary() -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(_Bytes()))
