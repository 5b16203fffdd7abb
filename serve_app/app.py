"""The HTTP application: which path does what. Knows an engine only by its port; knows no Ray."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from rayseek.cluster.unit_report import UnitView
from rayseek.serve_app.answer import Answer
from rayseek.serve_app.chat import chat_answer
from rayseek.serve_app.cluster_api import Views, add_cluster
from rayseek.serve_app.completions import completion_answer
from rayseek.serve_app.engine_port import Engine
from rayseek.serve_app.errors import as_api_error, install_error_handlers
from rayseek.serve_app.messages import add_messages
from rayseek.serve_app.observer import Answers
from rayseek.serve_app.openapi import describe
from rayseek.serve_app.pages import add_pages
from rayseek.serve_app.protocol import ChatRequest, CompletionRequest, parse
from rayseek.serve_app.readiness import Readiness
from rayseek.serve_app.service import Service
from rayseek.serve_app.settings import ApiSettings
from rayseek.serve_app.tokenizer import Tokenizer
from rayseek.serve_app.transport import (
    Document,
    EventStream,
    read_json,
)

ROOTS = ("/v1", "", "/beta")  # DeepSeek serves the same under each
ABOUT = """\
{model} is served here by Rayseek.

  chat        POST {base}/v1/chat/completions
  completion  POST {base}/v1/completions
  messages    POST {base}/v1/messages (Anthropic's API)
  models      GET  {base}/v1/models
  pages       {base}/  {base}/chat  {base}/cluster  {base}/docs
  state       {base}/health  {base}/ready

  curl {base}/v1/chat/completions -H "Authorization: Bearer $API_KEY" \\
    -H "Content-Type: application/json" \\
    -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
"""

Answering = Callable[[Any, ApiSettings, Tokenizer, Engine], Awaitable[Answer]]


def build_app(
    settings: ApiSettings,
    tokenizer: Tokenizer,
    engine: Engine,
    service: Service | None = None,
    views: Views | None = None,
) -> FastAPI:
    """The whole API over one engine; a plain ASGI application.

    `service`: to share keys and queues with another front door. `views`: of the cluster's units.
    """
    service = service or Service(settings, tokenizer, engine)
    app = FastAPI(title=f"Rayseek: {settings.model}", version="1", docs_url=None, redoc_url=None)
    install_error_handlers(app)
    app.add_middleware(Answers, observer=service.observer)
    _add_generation(app, "/chat/completions", ChatRequest, chat_answer, service)
    _add_generation(app, "/completions", CompletionRequest, completion_answer, service)
    add_messages(app, service)
    _add_models(app, service)
    _add_state(app, settings, service.readiness)
    add_pages(app, settings, service.keys, ABOUT)
    add_cluster(app, service, views or _no_units)
    describe(app)
    return app


async def _no_units() -> list[UnitView]:
    return []


def _add_generation(
    app: FastAPI,
    path: str,
    kind: type[BaseModel],
    answering: Answering,
    service: Service,
) -> None:
    settings = service.settings

    async def generate(request: Request) -> Response:
        try:
            key = service.keys.check(request.headers.get("authorization"))
            body: Any = parse(kind, await read_json(request, settings.body_limit_bytes))
            service.check_model(key, body.model)
            with service.admitted(key) as lease:
                answer = await answering(body, settings, service.tokenizer, service.engine(lease))
            if body.streams:
                return EventStream(answer.events(), settings.keep_alive_s, lease)
            return Document(answer.document(), settings.keep_alive_s, lease)
        except Exception as error:
            return as_api_error(error).response()

    for root in ROOTS:
        app.post(root + path, include_in_schema=root == "/v1")(generate)


def _add_models(app: FastAPI, service: Service) -> None:
    settings, keys = service.settings, service.keys

    def entry(name: str) -> dict[str, object]:
        return {
            "id": name,
            "object": "model",
            "created": settings.created,
            "owned_by": "rayseek",
            "max_model_len": settings.context_length,
        }

    async def models(request: Request) -> Response:
        key = keys.check(request.headers.get("authorization"))
        entries = [entry(name) for name in settings.models if key.may_use(name)]
        return JSONResponse({"object": "list", "data": entries})

    async def model(request: Request, model_id: str) -> Response:
        service.check_model(keys.check(request.headers.get("authorization")), model_id)
        return JSONResponse(entry(model_id))

    for root in ROOTS:
        app.get(f"{root}/models", include_in_schema=root == "/v1")(models)
        app.get(f"{root}/models/{{model_id:path}}", include_in_schema=root == "/v1")(model)


def _add_state(app: FastAPI, settings: ApiSettings, readiness: Readiness) -> None:
    async def health() -> Response:
        """This process is alive; nothing is said about the engine."""
        return JSONResponse({"status": "alive"})

    async def ready() -> Response:
        """200 if a token was made lately, or is made now; else 503 with the reason."""
        state = await readiness.check()
        return JSONResponse({**state, "model": settings.model}, 200 if state["ready"] else 503)

    for path, state in (("/health", health), ("/ready", ready)):
        app.get(path)(state)
        app.head(path, include_in_schema=False)(state)  # as some probes ask
