"""The edges of an HTTP exchange: reading a body, sending an event stream, a client that leaves."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from rayseek.serve_app.errors import ApiError, as_api_error, bad_request
from rayseek.serve_app.limits import Lease
from rayseek.serve_app.tokenizer import without_surrogates

KEEP_ALIVE = b": keep-alive\n\n"
ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


async def read_json(request: Request, limit_bytes: int) -> Any:
    """The body as JSON, strings free of lone surrogates. Raises ApiError (400, 413, 415)."""
    coding = request.headers.get("content-encoding", "identity").lower()
    if coding != "identity":
        message = f"the body is {coding}-encoded; send it as it is, without Content-Encoding"
        raise ApiError(415, message, code="unsupported_content_encoding")
    try:
        body = await _read_body(request, limit_bytes)
        return parse_json(body.decode("utf-8-sig"), "the body")
    except ClientDisconnect:
        raise bad_request("the connection ended within the body") from None
    except UnicodeDecodeError as error:
        raise bad_request(f"the body is not valid UTF-8: {error.reason} at {error.start}") from None


def parse_json(text: str, what: str, param: str | None = None) -> Any:
    """The value, strings free of lone surrogates. Raises ApiError (400): `what` is not JSON."""
    try:
        data = json.loads(text)
        return _clean(data) if ESCAPED_SURROGATE.search(text) else data
    except RecursionError:
        raise bad_request(f"{what} is JSON that is nested too deeply", param=param) from None
    except ValueError as error:
        raise bad_request(f"{what} is not valid JSON: {error}", param=param) from None


async def _read_body(request: Request, limit_bytes: int) -> bytes:
    """What is too long is read to its end, within reason, or the caller would never see why."""
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= limit_bytes:
            chunks.append(chunk)
        elif size > 8 * limit_bytes:
            break
    if size > limit_bytes:
        message = f"the body is larger than this server's limit of {limit_bytes:,} bytes"
        raise ApiError(413, message, code="request_too_large")
    return b"".join(chunks)


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return without_surrogates(value)
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, dict):
        return {_clean(k): _clean(v) for k, v in value.items()}
    return value


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _stop(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class Style:
    """How an API family writes what is not an answer."""

    keep_alive: bytes  # in a stream that is silent
    error_body: Callable[[ApiError], dict[str, Any]]
    error_prefix: str = ""  # of an error's event

    def error_response(self, error: BaseException) -> Response:
        known = as_api_error(error)
        return JSONResponse(self.error_body(known), known.status, headers=known.headers)

    def error_event(self, error: BaseException) -> bytes:
        document = json.dumps(self.error_body(as_api_error(error)), ensure_ascii=False)
        return f"{self.error_prefix}data: {document}\n\n".encode()


OPENAI = Style(KEEP_ALIVE, ApiError.body)


class Document(Response):
    """A JSON answer that may take long: blank lines keep the connection alive while it is made.

    The status is sent with the first blank line, and no blank line is sent before the lease says
    that the request is past the queue: until then an error is a proper HTTP error. After it, an
    error can only be the body.
    """

    media_type = "application/json"

    def __init__(
        self,
        work: Coroutine[Any, Any, dict[str, Any]],
        keep_alive_s: float,
        lease: Lease,
        style: Style = OPENAI,
    ) -> None:
        """`lease` is released when the exchange is over, however it ends."""
        self.background = None
        self.status_code = 200
        self.init_headers({"x-accel-buffering": "no"})
        self._work, self._keep_alive_s = work, keep_alive_s
        self._lease, self._style = lease, style

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        working = asyncio.create_task(self._work)
        leaving = asyncio.create_task(_disconnected(receive))
        tasks, started = (working, leaving), False
        try:
            while not working.done():
                await asyncio.wait(
                    tasks, timeout=self._keep_alive_s, return_when=asyncio.FIRST_COMPLETED
                )
                if leaving.done():
                    return
                if working.done() or not self._lease.admitted:
                    continue
                if not started:
                    await send(_start(self))
                    started = True
                await send({"type": "http.response.body", "body": b"\n", "more_body": True})
            error = working.exception()
            if error is not None:
                response = self._style.error_response(error)
            else:
                response = JSONResponse(working.result())
            if started:
                await send({"type": "http.response.body", "body": response.body})
            else:
                await response(scope, receive, send)
        finally:
            try:
                await _stop(*tasks)
            finally:  # also when we are cancelled once more while we wait
                self._lease.release()


def _start(response: Response) -> Message:
    return {
        "type": "http.response.start",
        "status": response.status_code,
        "headers": response.raw_headers,
    }


class EventStream(Response):
    """Server-sent events, sent as they come, with comments while nothing comes.

    The status line waits for the first event or the first comment: until then an error is a
    proper HTTP error. After it, an error is an event, and the stream ends without [DONE].
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        keep_alive_s: float,
        lease: Lease,
        style: Style = OPENAI,
    ) -> None:
        """`lease` is released when the exchange is over, however it ends."""
        self.background = None
        self.status_code = 200
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._events, self._keep_alive_s = events, keep_alive_s
        self._lease, self._style = lease, style
        self._started = False
        self._sending = asyncio.Lock()
        self._last_sent = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pump = asyncio.create_task(self._pump(send))
        leaving = asyncio.create_task(_disconnected(receive))
        beat = self._beat = asyncio.create_task(self._keep_alive(send))
        try:
            await asyncio.wait((pump, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            try:
                await _stop(pump, leaving, beat)
            finally:  # also when we are cancelled once more while we wait
                self._lease.release()
        if pump.cancelled():
            return
        error = pump.exception()
        if error is not None:
            await self._style.error_response(error)(scope, receive, send)

    async def _pump(self, send: Send) -> None:
        try:
            async for event in self._events:
                await self._send(send, event)
        except Exception as error:
            if not self._started:
                self._beat.cancel()  # or it might begin the answer before the error does
                raise
            await self._send(send, self._style.error_event(error))
        finally:
            await self._events.aclose()
        async with self._sending:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _keep_alive(self, send: Send) -> None:
        clock = asyncio.get_running_loop().time
        self._last_sent = clock()
        while True:
            await asyncio.sleep(max(0.001, self._last_sent + self._keep_alive_s - clock()))
            # A send that hangs means a slow reader, not a silent engine.
            if clock() - self._last_sent >= self._keep_alive_s and not self._sending.locked():
                await self._send(send, self._style.keep_alive)

    async def _send(self, send: Send, body: bytes) -> None:
        async with self._sending:
            if not self._started:
                self._started = True
                await send(_start(self))
            await send({"type": "http.response.body", "body": body, "more_body": True})
            self._last_sent = asyncio.get_running_loop().time()
