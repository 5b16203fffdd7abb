"""Errors as the API tells them: a status and OpenAI's body (spec section 6.6).

ApiError            status, message, type, param, code, headers
  from RequestRefused   503 with Retry-After, or 400 when this request can never run
  from anything else    500, logged; the server lives on
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from rayseek.cluster.request import RequestRefused

log = logging.getLogger("rayseek.api")


class ApiError(Exception):
    """Raised anywhere while a request is handled; told to the caller as it is."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param = status, message, kind, param
        self.code = code or kind
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> Response:
        return JSONResponse(self.body(), self.status, headers=self.headers)


def bad_request(message: str, *, param: str | None = None) -> ApiError:
    return ApiError(400, message, param=param)


def unauthorized(message: str) -> ApiError:
    return ApiError(
        401,
        message,
        kind="authentication_error",
        code="invalid_request_error",
        headers={"WWW-Authenticate": "Bearer"},
    )


def overloaded(message: str, retry_after_s: float) -> ApiError:
    headers = {"Retry-After": str(max(1, math.ceil(retry_after_s)))}
    return ApiError(503, message, kind="overloaded_error", code="overloaded", headers=headers)


def server_error(message: str) -> ApiError:
    return ApiError(500, message, kind="server_error")


def as_api_error(error: BaseException) -> ApiError:
    """What to tell the caller about any error; unexpected ones are logged with their trace."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestRefused):
        if error.retryable:
            return overloaded(error.reason, error.retry_after_s)
        return bad_request(error.reason)
    log.error("request failed", exc_info=error)
    return server_error("The server failed to handle this request; its log says why.")


def from_validation(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of pydantic's problems, with the parameter's path as callers write it."""
    problem = problems[0]
    param = ""
    for part in problem["loc"]:
        if isinstance(part, int):
            param += f"[{part}]"
        else:
            param += f".{part}" if param else part
    message = str(problem["msg"])
    given = problem.get("input")
    if isinstance(given, str | int | float) and problem["type"] != "missing":
        shown = repr(given)
        message += f" (got {shown if len(shown) <= 80 else shown[:77] + '...'})"
    return bad_request(f"{param}: {message}" if param else message, param=param or None)


def install_error_handlers(app: FastAPI) -> None:
    """Every error that a route or the router raises leaves in OpenAI's shape."""

    async def api_error(_: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = request.scope.get("path", "")
        messages = {
            404: f"Unknown path {path}. This server's API is described at /docs.",
            405: f"{request.method} is not allowed on {path}.",
        }
        message = messages.get(error.status_code, str(error.detail))
        return ApiError(error.status_code, message, headers=error.headers).response()

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(HTTPException, http_error)
