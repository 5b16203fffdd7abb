"""The gRPC front door: `chat.proto` over the same chat path, and the standard health service.

Serve runs the gRPC server (behind the proxy, beside HTTP) and calls the ingress's methods by the
names of the RPCs; `GrpcDoor` is where those methods come from. It knows Serve only by the
context that it is handed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, Protocol

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from rayseek.serve_app.answer import Answer
from rayseek.serve_app.chat import chat_answer
from rayseek.serve_app.chat_pb2 import (
    ChatChunk,
    ChatReply,
    ChatRequest,
    Message,
    ToolCall,
    ToolCallPiece,
    Usage,
)
from rayseek.serve_app.errors import ApiError, as_api_error, bad_request
from rayseek.serve_app.generation import Choice
from rayseek.serve_app.limits import Lease
from rayseek.serve_app.protocol import ChatRequest as ChatBody
from rayseek.serve_app.protocol import parse
from rayseek.serve_app.service import Service
from rayseek.serve_app.tool_calls import CallArguments, CallHeader
from rayseek.serve_app.transport import parse_json

SERVICE = "rayseek.v1.ChatService"
SERVICER_FUNCTIONS = [
    f"{__name__}.add_chat_to_server",
    "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server",
]
HEALTH_EVERY_S = 5.0
CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
}


def add_chat_to_server(servicer: Any, server: Any) -> None:
    """What generated code would be called `add_ChatServiceServicer_to_server`."""
    handlers = {
        "Chat": grpc.unary_unary_rpc_method_handler(
            servicer.Chat,
            request_deserializer=ChatRequest.FromString,
            response_serializer=ChatReply.SerializeToString,
        ),
        "ChatStream": grpc.unary_stream_rpc_method_handler(
            servicer.ChatStream,
            request_deserializer=ChatRequest.FromString,
            response_serializer=ChatChunk.SerializeToString,
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


class CallContext(Protocol):
    """What is needed of a call's context; Serve's and grpc's own have it."""

    def invocation_metadata(self) -> Any: ...

    def set_code(self, code: grpc.StatusCode) -> None: ...

    def set_details(self, details: str) -> None: ...


class CallFailed(Exception):
    """The call's status is set; raised so that nothing else is sent."""


class GrpcDoor:
    """Base of the ingress: its methods with RPCs' names."""

    _service: Service

    async def Chat(self, request: ChatRequest, grpc_context: CallContext) -> ChatReply:
        reply = ChatReply()
        calls: list[ToolCall] = []
        try:
            answer, lease = await self._begin(request, grpc_context)
            try:
                async for chunk in _chunks(answer):
                    reply.content += chunk.content
                    for piece in chunk.tool_calls:
                        if piece.id:
                            calls.append(ToolCall(id=piece.id, name=piece.name))
                        calls[piece.index].arguments += piece.arguments
                    if chunk.finish_reason:
                        reply.finish_reason = chunk.finish_reason
                        reply.usage.CopyFrom(chunk.usage)
            finally:
                lease.release()
        except Exception as error:
            raise _failed(error, grpc_context) from None
        reply.id, reply.model = answer.choices[0].request.id, request.model
        reply.tool_calls.extend(calls)
        return reply

    async def ChatStream(
        self, request: ChatRequest, grpc_context: CallContext
    ) -> AsyncGenerator[ChatChunk, None]:
        try:
            answer, lease = await self._begin(request, grpc_context)
            chunks = _chunks(answer)
            try:
                async for chunk in chunks:
                    yield chunk
            finally:
                try:
                    await chunks.aclose()
                finally:
                    lease.release()
        except Exception as error:
            raise _failed(error, grpc_context) from None

    async def Check(self, request: HealthCheckRequest) -> HealthCheckResponse:
        """The standard health service: SERVING while tokens are made, as `/ready`."""
        ready = (await self._service.readiness.check())["ready"]
        status = HealthCheckResponse.SERVING if ready else HealthCheckResponse.NOT_SERVING
        return HealthCheckResponse(status=status)

    async def Watch(self, request: HealthCheckRequest) -> AsyncGenerator[HealthCheckResponse, None]:
        last: HealthCheckResponse | None = None
        while True:
            state = await self.Check(request)
            if state != last:
                yield state
            last = state
            await asyncio.sleep(HEALTH_EVERY_S)

    async def _begin(self, request: ChatRequest, context: CallContext) -> tuple[Answer, Lease]:
        service = self._service
        metadata = dict(context.invocation_metadata())
        key = service.keys.check(metadata.get("authorization"), metadata.get("x-api-key"))
        body = parse(ChatBody, body_of(request))
        if body.streams or (body.n or 1) != 1:
            raise bad_request("more_json: stream and n are not for gRPC", param="more_json")
        service.check_model(key, body.model)
        with service.admitted(key) as lease:
            engine = service.engine(lease)
            return await chat_answer(body, service.settings, service.tokenizer, engine), lease


def body_of(request: ChatRequest) -> dict[str, Any]:
    """The same request as the HTTP API has it. Raises ApiError (400)."""
    body: dict[str, Any] = _json(request.more_json, "more_json", dict) or {}
    body |= {"model": request.model, "messages": [_message(m) for m in request.messages]}
    for field in (
        "temperature", "top_p", "max_tokens", "seed", "frequency_penalty", "presence_penalty",
    ):  # fmt: skip
        if request.HasField(field):
            body[field] = getattr(request, field)
    if request.stop:
        body["stop"] = list(request.stop)
    if request.tools_json:
        body["tools"] = _json(request.tools_json, "tools_json", list)
    if request.tool_choice_json:
        body["tool_choice"] = _json(request.tool_choice_json, "tool_choice_json", (str, dict))
    return body


def _json(text: str, name: str, kind: type | tuple[type, ...]) -> Any:
    if not text:
        return None
    value = parse_json(text, name, name)
    if not isinstance(value, kind):
        raise bad_request(f"{name} holds a {type(value).__name__}", param=name)
    return value


def _message(message: Message) -> dict[str, Any]:
    """Without what is not set."""
    fields: dict[str, Any] = {"role": message.role}
    for name in ("content", "tool_call_id"):
        if message.HasField(name):
            fields[name] = getattr(message, name)
    if message.tool_calls:
        fields["tool_calls"] = [
            {"id": c.id, "function": {"name": c.name, "arguments": c.arguments}}
            for c in message.tool_calls
        ]
    if message.prefix:
        fields["prefix"] = True
    return fields


async def _chunks(answer: Answer) -> AsyncGenerator[ChatChunk, None]:
    """The answer's pieces, those that say something. Closing it cancels the request."""
    pieces = answer.pieces()
    try:
        async for choice, piece in pieces:
            calls: list[ToolCallPiece] = []
            for event in piece.calls:
                if isinstance(event, CallHeader):
                    name = f"{choice.request.id}-{event.index}"
                    calls.append(ToolCallPiece(index=event.index, id=name, name=event.name))
                elif isinstance(event, CallArguments):
                    calls.append(ToolCallPiece(index=event.index, arguments=event.text))
            if piece.finish:
                yield ChatChunk(
                    content=piece.text,
                    tool_calls=calls,
                    finish_reason=piece.finish,
                    usage=_usage(choice),
                )
            elif piece.text or calls:
                yield ChatChunk(content=piece.text, tool_calls=calls)
    finally:
        await pieces.aclose()


def _usage(choice: Choice) -> Usage:
    return Usage(
        prompt_tokens=choice.prompt_tokens,
        completion_tokens=choice.completion_tokens,
        prompt_cache_hit_tokens=choice.cached_tokens,
    )


def _failed(error: Exception, context: CallContext) -> CallFailed:
    """Tell the call its status."""
    known: ApiError = as_api_error(error)
    context.set_code(CODES.get(known.status, grpc.StatusCode.INTERNAL))
    after = known.headers.get("Retry-After")
    # In the text, because Serve drops the trailing metadata of a call that fails.
    details = known.message + (f" (retry-after: {after})" if after else "")
    context.set_details(details)
    return CallFailed(details)
