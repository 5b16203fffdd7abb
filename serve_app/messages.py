"""`/v1/messages`: Anthropic's Messages API, translated to a chat request and back.

A thin layer over the chat path: what the words mean (temperature, limits, tools, errors) is decided
there. Fields as spec section 6.5's last paragraph has them; further fields are ignored, and
content of other kinds than text, tool_use and tool_result is refused.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator, Iterable
from typing import Annotated, Any, Literal, TypeVar

from fastapi import FastAPI, Request
from pydantic import BeforeValidator, Field
from pydantic_core import from_json
from starlette.responses import JSONResponse, Response

from rayseek.serve_app.answer import Answer, dump
from rayseek.serve_app.chat import chat_answer
from rayseek.serve_app.errors import ApiError, bad_request
from rayseek.serve_app.generation import Choice, Piece
from rayseek.serve_app.keys import Key
from rayseek.serve_app.protocol import ChatRequest, parse
from rayseek.serve_app.service import Service
from rayseek.serve_app.strict import Several, StrictBody
from rayseek.serve_app.tool_calls import CallArguments, CallEnd, CallEvent, CallHeader
from rayseek.serve_app.transport import Document, EventStream, Style, read_json

ROOTS = ("/v1/messages", "/anthropic/v1/messages")
ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}
STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}

Json = dict[str, Any]


def error_body(error: ApiError) -> Json:
    kind = ERROR_TYPES.get(error.status, "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


ANTHROPIC = Style(b'event: ping\ndata: {"type": "ping"}\n\n', error_body, "event: error\n")


# ---- the request ----


def _blocks(value: object) -> object:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class TextBlock(StrictBody):
    type: Literal["text"]
    text: str


Texts = Annotated[Several[TextBlock], BeforeValidator(_blocks)]  # a string is one block


class ToolUseBlock(StrictBody):
    type: Literal["tool_use"]
    id: str
    name: str
    input: Json


class ToolResultBlock(StrictBody):
    type: Literal["tool_result"]
    tool_use_id: str
    content: Texts | None = None


Block = Annotated[TextBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")]


class Turn(StrictBody):
    role: Literal["user", "assistant"]
    content: Annotated[Several[Block], BeforeValidator(_blocks)]


class ToolDeclaration(StrictBody):
    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: Json
    strict: bool | None = None


class ToolChoice(StrictBody):
    type: Literal["none", "auto", "any", "tool"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class CountRequest(StrictBody):
    """What `count_tokens` needs; a Messages request has more."""

    model: str
    messages: Several[Turn] = Field(min_length=1)
    system: Texts | None = None
    tools: Several[ToolDeclaration] | None = None
    tool_choice: ToolChoice | None = None


class MessagesRequest(CountRequest):
    max_tokens: int = Field(ge=1)
    stop_sequences: Several[str] | None = None
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)


Asked = TypeVar("Asked", bound=CountRequest)


def _joined(texts: Iterable[TextBlock]) -> str:
    """Blocks are paragraphs: nothing in them says where one ends."""
    return "\n".join(block.text for block in texts)


def _chat_messages(turn: Turn, where: str, *, last: bool) -> list[Json]:
    """A turn as chat messages. Tool results go first, each as a message of its own."""
    texts = [block for block in turn.content if isinstance(block, TextBlock)]
    uses = [block for block in turn.content if isinstance(block, ToolUseBlock)]
    results = [block for block in turn.content if isinstance(block, ToolResultBlock)]
    if turn.role == "assistant":
        if results:
            raise bad_request(f"{where}: tool_result blocks belong to role user")
        message: Json = {"role": "assistant", "content": _joined(texts)}
        if uses:
            message["content"] = message["content"] or None
            message["tool_calls"] = [
                {"id": use.id, "type": "function",
                 "function": {"name": use.name,
                              "arguments": json.dumps(use.input, ensure_ascii=False)}}
                for use in uses
            ]  # fmt: skip
        elif last:
            message["prefix"] = True  # the answer goes on from here
        return [message]
    if uses:
        raise bad_request(f"{where}: tool_use blocks belong to role assistant")
    messages: list[Json] = [
        {"role": "tool", "tool_call_id": r.tool_use_id, "content": _joined(r.content or ())}
        for r in results
    ]
    if texts or not results:
        messages.append({"role": "user", "content": _joined(texts)})
    return messages


def to_chat(body: CountRequest) -> ChatRequest:
    """Raises ApiError (400); it may name the field as the chat API calls it."""
    messages = [{"role": "system", "content": _joined(body.system)}] if body.system else []
    for index, turn in enumerate(body.messages):
        last = index == len(body.messages) - 1
        messages += _chat_messages(turn, f"messages[{index}]", last=last)
    chat: Json = {"model": body.model, "messages": messages, "max_tokens": 1}
    if body.tools:
        functions = [
            {"name": tool.name, "description": tool.description, "parameters": tool.input_schema,
             "strict": tool.strict}
            for tool in body.tools
        ]  # fmt: skip
        chat["tools"] = [{"type": "function", "function": function} for function in functions]
    if choice := body.tool_choice:
        if choice.type == "tool":
            if choice.name is None:
                raise bad_request("tool_choice.name: Field required")
            chat["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
        else:
            chat["tool_choice"] = "required" if choice.type == "any" else choice.type
        chat["parallel_tool_calls"] = not choice.disable_parallel_tool_use
    if isinstance(body, MessagesRequest):
        chat |= {
            "max_tokens": body.max_tokens, "stop": body.stop_sequences,
            "temperature": body.temperature, "top_p": body.top_p,
        }  # fmt: skip
    return parse(ChatRequest, chat)


# ---- the answer ----


class MessagesAnswer:
    """One chat choice as a message; the whole one is put together from the streamed events."""

    def __init__(self, answer: Answer, model: str) -> None:
        self._answer, self._model = answer, model

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events, at most one `bytes` per piece. Raises what the engine raises."""
        steps = self._steps()
        try:
            async for events in steps:
                yield b"".join(f"event: {e['type']}\ndata: {dump(e)}\n\n".encode() for e in events)
        finally:
            await steps.aclose()

    async def document(self) -> Json:
        """The whole message. Raises what the engine raises."""
        message: Json = {}
        parts: list[list[str]] = []
        steps = self._steps()
        try:
            async for events in steps:
                for event in events:
                    match event["type"]:
                        case "message_start":
                            message = event["message"]
                        case "content_block_start":
                            message["content"].append(event["content_block"])
                            parts.append([])
                        case "content_block_delta":
                            delta = event["delta"]
                            parts[-1].append(delta.get("text") or delta.get("partial_json") or "")
                        case "message_delta":
                            message |= event["delta"]
                            message["usage"] = event["usage"]
        finally:
            await steps.aclose()
        for block, texts in zip(message["content"], parts, strict=True):
            if block["type"] == "text":
                block["text"] = "".join(texts)
            else:
                block["input"] = _arguments("".join(texts))
        return message

    async def _steps(self) -> AsyncGenerator[list[Json], None]:
        writer: _Writer | None = None
        pieces = self._answer.pieces()
        try:
            async for choice, piece in pieces:
                events: list[Json] = []
                if writer is None:  # the first piece knows what came from the cache
                    writer = _Writer()
                    events.append({"type": "message_start", "message": self._opening(choice)})
                events += writer.piece(piece)
                if piece.finish:
                    events += self._ending(choice, piece.finish)
                if events:
                    yield events
        finally:
            await pieces.aclose()

    def _opening(self, choice: Choice) -> Json:
        return {
            "id": f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(choice),
        }

    def _ending(self, choice: Choice, finish: str) -> list[Json]:
        stop = choice.stop_string
        reason = "stop_sequence" if stop is not None else STOP_REASONS[finish]
        delta = {"stop_reason": reason, "stop_sequence": stop}
        return [
            {"type": "message_delta", "delta": delta, "usage": _usage(choice)},
            {"type": "message_stop"},
        ]


class _Writer:
    """Content blocks, numbered, one open at a time."""

    def __init__(self) -> None:
        self._index, self._open = -1, ""

    def piece(self, piece: Piece) -> list[Json]:
        events: list[Json] = []
        if piece.text:
            if self._open != "text":
                events += self._start({"type": "text", "text": ""})
            events.append(self._delta({"type": "text_delta", "text": piece.text}))
        for call in piece.calls:
            events += self._call(call)
        return events + (self._stop() if piece.finish else [])

    def _call(self, event: CallEvent) -> list[Json]:
        match event:
            case CallHeader():
                name = f"toolu_{uuid.uuid4().hex[:24]}"
                return self._start(
                    {"type": "tool_use", "id": name, "name": event.name, "input": {}}
                )
            case CallArguments():
                return [self._delta({"type": "input_json_delta", "partial_json": event.text})]
            case CallEnd():
                return self._stop()

    def _start(self, block: Json) -> list[Json]:
        closed = self._stop()
        self._index += 1
        self._open = block["type"]
        start = {"type": "content_block_start", "index": self._index, "content_block": block}
        return [*closed, start]

    def _delta(self, delta: Json) -> Json:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _stop(self) -> list[Json]:
        if not self._open:
            return []
        self._open = ""
        return [{"type": "content_block_stop", "index": self._index}]


def _arguments(text: str) -> Json:
    """What clients make of a stream's pieces: of arguments that were cut, what is there."""
    try:
        value = from_json(text, allow_partial=True) if text else {}
    except ValueError:
        value = {}
    return value if isinstance(value, dict) else {}


def _usage(choice: Choice) -> Json:
    """In this API cached tokens are not among the input tokens."""
    return {
        "input_tokens": choice.prompt_tokens - choice.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": choice.cached_tokens,
        "output_tokens": choice.completion_tokens,
    }


# ---- the routes ----


def add_messages(app: FastAPI, service: Service) -> None:
    settings = service.settings

    async def asked(request: Request, kind: type[Asked]) -> tuple[Key, Asked, ChatRequest]:
        credentials = request.headers.get("authorization"), request.headers.get("x-api-key")
        key = service.keys.check(*credentials)
        body = parse(kind, await read_json(request, settings.body_limit_bytes))
        service.check_model(key, body.model)
        return key, body, to_chat(body)

    async def messages(request: Request) -> Response:
        """Anthropic's Messages API."""
        try:
            key, body, chat = await asked(request, MessagesRequest)
            with service.admitted(key) as lease:
                engine = service.engine(lease)
                answer = await chat_answer(chat, settings, service.tokenizer, engine)
            told = MessagesAnswer(answer, body.model)
            if body.stream:
                return EventStream(told.events(), settings.keep_alive_s, lease, ANTHROPIC)
            return Document(told.document(), settings.keep_alive_s, lease, ANTHROPIC)
        except Exception as error:
            return ANTHROPIC.error_response(error)

    async def count_tokens(request: Request) -> Response:
        """How many tokens a Messages request's prompt has."""
        try:
            key, _, chat = await asked(request, CountRequest)
            with service.admitted(key) as lease:
                answer = await chat_answer(chat, settings, service.tokenizer, service.watched)
                lease.release()
            return JSONResponse({"input_tokens": answer.choices[0].prompt_tokens})
        except Exception as error:
            return ANTHROPIC.error_response(error)

    for root in ROOTS:
        app.post(root, include_in_schema=False)(messages)
        app.post(f"{root}/count_tokens", include_in_schema=False)(count_tokens)
