"""The OpenAPI document of `/openapi.json`: bodies, answers and errors as they really are.

The routes read their bodies themselves and answer with bytes, so FastAPI knows only their paths;
what stands here is checked against the running application by the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from rayseek.serve_app.protocol import ChatRequest, CompletionRequest

SCHEMAS = "#/components/schemas/"
Json = dict[str, Any]
STATUSES: Mapping[int, str] = {
    400: "The request is malformed or asks for what is not possible; `param` names the field.",
    401: "No key, or an unknown one.",
    403: "This key may not do this.",
    404: "No such model.",
    413: "The body is too large.",
    415: "The body has a Content-Encoding.",
    429: "This key's limit is reached.",
    500: "The server failed to handle this request.",
    503: "Overloaded, or no engine is up.",
}


class Said(BaseModel):
    """A part of an answer. Closed: what is not described here is not sent."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetail(Said):
    message: str = Field(min_length=1)
    type: str
    param: str | None
    code: str


class Error(Said):
    error: ErrorDetail


class CachedTokens(Said):
    cached_tokens: int = Field(ge=0)


class Predictions(Said):
    """Drafts of the server's own MTP module; rejected ones are no completion tokens."""

    accepted_prediction_tokens: int = Field(ge=0)
    rejected_prediction_tokens: int = Field(ge=0)


class Usage(Said):
    prompt_tokens: int = Field(ge=1)
    completion_tokens: int = Field(ge=0)
    total_tokens: int = Field(ge=1)
    prompt_tokens_details: CachedTokens
    completion_tokens_details: Predictions
    prompt_cache_hit_tokens: int = Field(ge=0)
    prompt_cache_miss_tokens: int = Field(ge=0)


class TokenLogprob(Said):
    token: str
    logprob: float = Field(ge=-9999, le=0)
    bytes: list[int]


class ChosenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob] = Field(max_length=20)


class ChatLogprobs(Said):
    content: list[ChosenLogprob]


class CallFunction(Said):
    name: str
    arguments: str


class Call(Said):
    index: int = Field(ge=0)
    id: str
    type: Literal["function"]
    function: CallFunction


class AnswerMessage(Said):
    role: Literal["assistant"]
    content: str | None
    tool_calls: list[Call] = Field(default=[], min_length=1)


Finish = Literal["stop", "length", "tool_calls"]


class ChatChoice(Said):
    index: int = Field(ge=0)
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class CallFunctionDelta(Said):
    name: str = ""
    arguments: str = ""


class CallDelta(Said):
    """The first of a call has id, type and name; those after it add to its arguments."""

    index: int = Field(ge=0)
    id: str = ""
    type: Literal["function"] = "function"
    function: CallFunctionDelta


class MessageDelta(Said):
    role: Literal["assistant"] = "assistant"
    content: str | None = None
    tool_calls: list[CallDelta] = []


class ChatChunkChoice(Said):
    index: int = Field(ge=0)
    delta: MessageDelta
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None


class _Head(Said):
    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatCompletion(_Head):
    object: Literal["chat.completion"]
    choices: list[ChatChoice] = Field(min_length=1)
    usage: Usage


class ChatChunk(_Head):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class TextLogprobs(Said):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(Said):
    index: int = Field(ge=0)
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Finish


class TextChunkChoice(Said):
    index: int = Field(ge=0)
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Finish | None


class TextCompletion(_Head):
    object: Literal["text_completion"]
    choices: list[TextChoice] = Field(min_length=1)
    usage: Usage


class TextChunk(_Head):
    object: Literal["text_completion"]
    choices: list[TextChunkChoice]
    usage: Usage | None = None


class Model(Said):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(Said):
    object: Literal["list"]
    data: list[Model] = Field(min_length=1)


class Health(Said):
    status: Literal["alive"]


class Ready(Said):
    ready: bool
    last_token_age_s: float | None
    model: str
    reason: str = ""
    degraded: list[str] = Field(default=[], description="What is missing meanwhile.")


HEADERS: dict[int, Json] = {
    401: {"WWW-Authenticate": {"schema": {"const": "Bearer"}, "required": True}},
    429: {"Retry-After": {"schema": {"type": "string"}}},
    503: {"Retry-After": {"schema": {"type": "string"}}},
}


GENERATION: tuple[tuple[str, str, type[BaseModel], type[BaseModel], type[BaseModel]], ...] = (
    ("/v1/chat/completions", "Answer a conversation", ChatRequest, ChatCompletion, ChatChunk),
    ("/v1/completions", "Continue a text or fill its middle", CompletionRequest, TextCompletion,
     TextChunk),
)  # fmt: skip


def describe(app: FastAPI) -> None:
    """Have `app` tell the whole document."""
    paths = app.openapi

    def openapi() -> Json:
        if app.openapi_schema is None:
            document = paths()
            _describe_operations(document)
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]


def _describe_operations(document: Json) -> None:
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}

    def ref(kind: type[BaseModel]) -> Json:
        if kind.__name__ not in schemas:
            schema = kind.model_json_schema(ref_template=SCHEMAS + "{model}")
            schemas.update(schema.pop("$defs", {}), **{kind.__name__: schema})
        return {"$ref": SCHEMAS + kind.__name__}

    def reply(kind: type[BaseModel], description: str, status: int = 200) -> Json:
        content = {"application/json": {"schema": ref(kind)}}
        described: Json = {"description": description, "content": content}
        return described | ({"headers": HEADERS[status]} if status in HEADERS else {})

    def errors(*statuses: int) -> Json:
        return {str(status): reply(Error, STATUSES[status], status) for status in statuses}

    def operation(path: str, method: str, summary: str, responses: Json, **more: JsonValue) -> None:
        described: Json = document["paths"][path][method]
        described.pop("description", None)
        described.update(more, summary=summary, responses=responses)

    def event(chunk: type[BaseModel]) -> Json:
        """One of a stream's events; the data of the last is `[DONE]`."""
        data = {
            "type": "string",
            "anyOf": [
                {"const": "[DONE]"},
                {"contentMediaType": "application/json", "contentSchema": ref(chunk)},
            ],
        }
        return {"schema": {"type": "object", "properties": {"data": data}, "required": ["data"]}}

    for path, summary, body, answer, chunk in GENERATION:
        done = reply(answer, "The answer, or with `stream: true` its chunks.")
        done["content"]["text/event-stream"] = event(chunk)
        content: Json = {"application/json": {"schema": ref(body)}}
        operation(
            path, "post", summary, {"200": done, **errors(*STATUSES)},
            requestBody={"required": True, "content": content}, security=[{"key": []}],
        )  # fmt: skip
    for path, summary, kind, statuses in (
        ("/v1/models", "List the models", ModelList, (401,)),
        ("/v1/models/{model_id}", "Describe a model", Model, (401, 403, 404)),
    ):
        told = {"200": reply(kind, "What is served."), **errors(*statuses)}
        operation(path, "get", summary, told, security=[{"key": []}])
    operation(
        "/health", "get", "Is this process alive?", {"200": reply(Health, "This process is alive.")}
    )
    operation(
        "/ready", "get", "Are tokens made?",
        {"200": reply(Ready, "Tokens are made."), "503": reply(Ready, "`reason` says why not.")},
    )  # fmt: skip
