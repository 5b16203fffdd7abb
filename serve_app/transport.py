"""The edges of an HTTP exchange: reading a body, sending an event stream, a client that leaves."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayseek.serve_app.errors import ApiError, as_api_error, bad_request

T = TypeVar("T")
KEEP_ALIVE = b": keep-alive\n\n"
ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class AnyCaseMethod:
    """Let `Post` be POST: methods are case-sensitive, and a published sample sends `Post`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not scope["method"].isupper():
            scope = {**scope, "method": scope["method"].upper()}
        await self._app(scope, receive, send)


async def read_json(request: Request, limit_bytes: int) -> Any:
    """The body as JSON, strings free of lone surrogates. Raises ApiError (400, 413)."""
    body = await _read_body(request, limit_bytes)
    try:
        data = json.loads(body.decode("utf-8-sig"))
        return _without_surrogates(data) if ESCAPED_SURROGATE.search(body) else data
    except UnicodeDecodeError as error:
        raise bad_request(f"the body is not valid UTF-8: {error.reason} at {error.start}") from None
    except RecursionError:
        raise bad_request("the body's JSON is nested too deeply") from None
    except ValueError as error:
        raise bad_request(f"the body is not valid JSON: {error}") from None


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


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {_without_surrogates(k): _without_surrogates(v) for k, v in value.items()}
    return value


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _stop(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes away (ClientDisconnect)."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnected(request.receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return await working
    finally:
        await _stop(working, leaving)


class EventStream(Response):
    """Server-sent events, sent as they come, with comments while nothing comes.

    The status line waits for the first event or the first comment: until then an error is a
    proper HTTP error. After it, an error is an event, and the stream ends without [DONE].
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], keep_alive_s: float) -> None:
        self.background = None
        self.status_code = 200
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._events, self._keep_alive_s = events, keep_alive_s
        self._started = False
        self._sending = asyncio.Lock()
        self._last_sent = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pump = asyncio.create_task(self._pump(send))
        leaving = asyncio.create_task(_disconnected(receive))
        beat = asyncio.create_task(self._keep_alive(send))
        try:
            await asyncio.wait((pump, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _stop(pump, leaving, beat)
        if pump.cancelled():
            return
        error = pump.exception()
        if error is not None:
            await as_api_error(error).response()(scope, receive, send)

    async def _pump(self, send: Send) -> None:
        try:
            async for event in self._events:
                await self._send(send, event)
        except Exception as error:
            if not self._started:
                raise
            document = json.dumps(as_api_error(error).body(), ensure_ascii=False)
            await self._send(send, f"data: {document}\n\n".encode())
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
                await self._send(send, KEEP_ALIVE)

    async def _send(self, send: Send, body: bytes) -> None:
        async with self._sending:
            if not self._started:
                self._started = True
                start: Message = {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
                await send(start)
            await send({"type": "http.response.body", "body": body, "more_body": True})
            self._last_sent = asyncio.get_running_loop().time()
