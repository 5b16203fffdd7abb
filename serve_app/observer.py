"""What is noted of every request and every HTTP answer: metrics, a log line a sequence, spans.

Nothing here happens per token but two comparisons and a look at the clock.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayseek.cluster.logs import fields
from rayseek.cluster.metrics import Meter, NoMeter
from rayseek.cluster.request import Delta, FinishReason, Request, RequestRefused
from rayseek.cluster.traces import begin, describe, fail, record, serving, traceparent

log = logging.getLogger("rayseek.requests")

MOST_KEYS = 100  # with a label of their own; further ones share "other"


class Sighting:
    """One sequence from its arrival to its end."""

    def __init__(self, request: Request, key: str, arrived: float) -> None:
        """arrived: time.monotonic() when its HTTP request was let in."""
        self.request, self.key, self.arrived = request, key, arrived
        self.prompt_tokens = 0  # that the request pays for; choices share a prompt
        self.cached_tokens = self.tokens = 0
        self.finish = "closed"  # unless we hear otherwise
        self.error: str | None = None
        self.begun: float | None = None
        self.first: float | None = None
        self.last = arrived
        self.longest_pause_s = 0.0
        self.span = begin("sequence", arrived)
        self.trace = traceparent(self.span)

    def begins(self, prompt_tokens: int) -> None:
        """It leaves the queue."""
        self.begun, self.prompt_tokens = time.monotonic(), prompt_tokens

    def took(self, delta: Delta) -> None:
        if delta.tokens:
            now = time.monotonic()
            if self.first is None:
                self.first = now
                self.cached_tokens = min(delta.cached_tokens or 0, self.prompt_tokens)
            elif now - self.last > self.longest_pause_s:
                self.longest_pause_s = now - self.last
            self.last = now
            self.tokens += len(delta.tokens)
        if delta.finish is not None:
            self.finish, self.error = delta.finish.value, delta.error


class Observer:
    """Of one ingress replica."""

    def __init__(self, meter: Meter | None = None) -> None:
        self._meter = meter or NoMeter()
        self._keys: set[str] = set()
        self._moved = 0

    @contextmanager
    def sequence(self, request: Request, key: str, arrived: float) -> Iterator[Sighting]:
        """Around all that happens to a sequence; what it raises is noted, and raised on."""
        seen = Sighting(request, key, arrived)
        try:
            yield seen
        except RequestRefused as refusal:
            seen.finish, seen.error = "refused", refusal.reason
            raise
        except Exception as error:
            seen.finish, seen.error = FinishReason.ERROR.value, repr(error)
            raise
        finally:
            self._ended(seen)

    def answered(self, route: str, status: int) -> None:
        """An HTTP answer has begun."""
        self._meter.add("http_responses", 1, route=route, status=str(status))

    def state(self, running: int, waiting: int, moved: int) -> None:
        """Sequences at the engine and in the queue now; moved: so far."""
        self._meter.set("requests_running", running)
        self._meter.set("requests_waiting", waiting)
        self._meter.add("requests_moved", moved - self._moved)
        self._moved = moved

    def _ended(self, seen: Sighting) -> None:
        _trace(seen)
        meter, key = self._meter, self._label(seen.key)
        meter.add("requests", 1, key=key, finish=seen.finish)
        meter.add("prompt_tokens", seen.prompt_tokens, key=key)
        meter.add("cached_prompt_tokens", seen.cached_tokens, key=key)
        meter.add("generation_tokens", seen.tokens, key=key)
        times: dict[str, float] = {}
        if seen.begun is not None:
            times["queue"] = seen.begun - seen.arrived
            meter.observe("queue_seconds", times["queue"])
            meter.observe("request_prompt_tokens", len(seen.request.prompt_ids))
        if seen.first is not None:
            times["time_to_first_token"] = seen.first - seen.arrived
            times["request"] = seen.last - seen.arrived
            times["longest_pause"] = seen.longest_pause_s
            if seen.tokens > 1:
                times["inter_token"] = (seen.last - seen.first) / (seen.tokens - 1)
                meter.observe("inter_token_seconds", times["inter_token"])
                meter.observe("longest_pause_seconds", seen.longest_pause_s)
            meter.observe("time_to_first_token_seconds", times["time_to_first_token"])
            meter.observe("request_seconds", times["request"])
            meter.observe("request_generation_tokens", seen.tokens)
        failed = seen.finish in (FinishReason.ERROR.value, "refused")
        log.log(
            logging.WARNING if failed else logging.INFO,
            "%s after %d tokens",
            seen.finish,
            seen.tokens,
            extra=fields(
                request=seen.request.id,
                key=seen.key,
                finish=seen.finish,
                prompt_tokens=seen.prompt_tokens,
                cached_tokens=seen.cached_tokens,
                tokens=seen.tokens,
                seconds={name: round(value, 4) for name, value in times.items()},
                **({"reason": seen.error} if seen.error else {}),
            ),
        )

    def _label(self, key: str) -> str:
        if key not in self._keys:
            if len(self._keys) >= MOST_KEYS:
                return "other"
            self._keys.add(key)
        return key


def _trace(seen: Sighting) -> None:
    """End a sequence's span; attributes by OpenTelemetry's conventions for generative models."""
    if not seen.trace:
        return
    if seen.begun is not None:
        record("queue", seen.trace, seen.arrived, seen.begun)
    if seen.first is not None:
        record("first token", seen.trace, seen.arrived, seen.first)
    describe(
        seen.span,
        gen_ai__usage__input_tokens=len(seen.request.prompt_ids),
        gen_ai__usage__output_tokens=seen.tokens,
        gen_ai__response__id=seen.request.id,
        gen_ai__response__finish_reasons=[seen.finish],
        rayseek__cached_tokens=seen.cached_tokens,
        rayseek__key=seen.key,
        rayseek__longest_pause_s=round(seen.longest_pause_s, 4),
    )
    if seen.error:
        fail(seen.span, seen.error)
    seen.span.end()


class Answers:
    """ASGI middleware: counts answers by the route that gave them, and has a span for each POST."""

    def __init__(self, app: ASGIApp, observer: Observer) -> None:
        self._app, self._observer = app, observer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "unknown")
                self._observer.answered(route, message["status"])
                if span is not None:
                    describe(span, http__route=route, http__response__status_code=message["status"])
            await send(message)

        if scope["method"] != "POST":  # pages, probes, metrics
            span = None
            await self._app(scope, receive, counting)
            return
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        with serving(f"POST {scope['path']}", headers) as span:
            await self._app(scope, receive, counting)
