"""The HTTP application: which path does what. Knows an engine only by its port; knows no Ray."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, PlainTextResponse, Response

from rayseek.serve_app.answer import Answer
from rayseek.serve_app.chat import chat_answer
from rayseek.serve_app.completions import completion_answer
from rayseek.serve_app.engine_port import Engine
from rayseek.serve_app.errors import ApiError, as_api_error, install_error_handlers
from rayseek.serve_app.keys import KeyRing
from rayseek.serve_app.protocol import ChatRequest, CompletionRequest, parse
from rayseek.serve_app.readiness import Readiness, WatchedEngine
from rayseek.serve_app.settings import ApiSettings
from rayseek.serve_app.tokenizer import Tokenizer
from rayseek.serve_app.transport import (
    AnyCaseMethod,
    EventStream,
    read_json,
    unless_disconnected,
)

SCHEMAS = "#/components/schemas/"
ROOTS = ("/v1", "", "/beta")  # DeepSeek serves the same under each
ABOUT = """\
{model} is served here by Rayseek.

  chat        POST {base}/v1/chat/completions
  completion  POST {base}/v1/completions
  models      GET  {base}/v1/models
  reference   {base}/docs
  state       {base}/health  {base}/ready

  curl {base}/v1/chat/completions -H "Authorization: Bearer $API_KEY" \\
    -H "Content-Type: application/json" \\
    -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
"""

Answering = Callable[[Any, ApiSettings, Tokenizer, Engine], Awaitable[Answer]]


def build_app(settings: ApiSettings, tokenizer: Tokenizer, engine: Engine) -> FastAPI:
    """The whole API over one engine; a plain ASGI application."""
    app = FastAPI(title=f"Rayseek: {settings.model}", version="1", redoc_url=None)
    watched = WatchedEngine(engine)
    keys = KeyRing(settings.api_keys)
    install_error_handlers(app)
    app.add_middleware(AnyCaseMethod)
    _add_generation(app, "/chat/completions", ChatRequest, chat_answer, settings, tokenizer,
                    watched, keys)  # fmt: skip
    _add_generation(app, "/completions", CompletionRequest, completion_answer, settings, tokenizer,
                    watched, keys)  # fmt: skip
    _describe_bodies(app, ChatRequest, CompletionRequest)
    _add_models(app, settings, keys)
    _add_state(app, settings, Readiness(watched, settings, tokenizer.bos_id))
    return app


def _add_generation(
    app: FastAPI,
    path: str,
    kind: type[BaseModel],
    answering: Answering,
    settings: ApiSettings,
    tokenizer: Tokenizer,
    engine: Engine,
    keys: KeyRing,
) -> None:
    async def generate(request: Request) -> Response:
        try:
            keys.check(request.headers.get("authorization"))
            body: Any = parse(kind, await read_json(request, settings.body_limit_bytes))
            _check_model(body.model, settings)
            answer = await answering(body, settings, tokenizer, engine)
            if body.streams:
                return EventStream(answer.events(), settings.keep_alive_s)
            return JSONResponse(await unless_disconnected(request, answer.document()))
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        except Exception as error:
            return as_api_error(error).response()

    generate.__doc__ = answering.__doc__
    schema = {"$ref": SCHEMAS + kind.__name__}
    extra = {"requestBody": {"content": {"application/json": {"schema": schema}}}}
    for root in ROOTS:
        shown = root == "/v1"
        app.post(root + path, openapi_extra=extra if shown else None, include_in_schema=shown)(
            generate
        )


def _describe_bodies(app: FastAPI, *kinds: type[BaseModel]) -> None:
    """Add the bodies, which FastAPI does not parse for us, to the OpenAPI document."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        document = plain()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for kind in kinds:
            schema = kind.model_json_schema(ref_template=SCHEMAS + "{model}")
            schemas.update(schema.pop("$defs", {}), **{kind.__name__: schema})
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _check_model(name: str, settings: ApiSettings) -> None:
    if name not in settings.models:
        served = ", ".join(settings.models)
        raise ApiError(
            404,
            f"The model {name!r} does not exist here; this server has: {served}",
            param="model",
            code="model_not_found",
        )


def _add_models(app: FastAPI, settings: ApiSettings, keys: KeyRing) -> None:
    def entry(name: str) -> dict[str, object]:
        return {
            "id": name,
            "object": "model",
            "created": settings.created,
            "owned_by": "rayseek",
            "max_model_len": settings.context_length,
        }

    async def models(request: Request) -> Response:
        keys.check(request.headers.get("authorization"))
        return JSONResponse({"object": "list", "data": [entry(name) for name in settings.models]})

    async def model(request: Request, model_id: str) -> Response:
        keys.check(request.headers.get("authorization"))
        _check_model(model_id, settings)
        return JSONResponse(entry(model_id))

    for root in ROOTS:
        app.get(f"{root}/models", include_in_schema=root == "/v1")(models)
        app.get(f"{root}/models/{{model_id:path}}", include_in_schema=root == "/v1")(model)


def _add_state(app: FastAPI, settings: ApiSettings, readiness: Readiness) -> None:
    async def about(request: Request) -> Response:
        base = str(request.base_url).rstrip("/")
        return PlainTextResponse(ABOUT.format(model=settings.model, base=base))

    async def health() -> Response:
        """This process is alive; nothing is said about the engine."""
        return JSONResponse({"status": "alive"})

    async def ready() -> Response:
        """200 if a token was made lately, or is made now; else 503 with the reason."""
        state = await readiness.check()
        return JSONResponse({**state, "model": settings.model}, 200 if state["ready"] else 503)

    app.get("/", include_in_schema=False)(about)
    app.get("/health")(health)
    app.get("/ready")(ready)
