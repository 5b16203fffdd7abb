"""Whether the engine makes tokens: seen in passing, or asked for (`/ready`)."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence

from rayseek.cluster.request import Delta, FinishReason, Request, SamplingParams
from rayseek.serve_app.engine_port import Engine
from rayseek.serve_app.settings import ApiSettings

MOVES_TOLD_S = 60.0  # after a move, /ready tells of it for so long
MOVES_NAMED = 5


def told_moves(ids: Sequence[str]) -> list[str]:
    """At most one sentence: which requests moved lately. ids: of them, the newest last."""
    if not ids:
        return []
    which = list(dict.fromkeys(reversed(ids)))
    last = ", ".join(which[:MOVES_NAMED])
    more = f", and {len(which) - MOVES_NAMED} before" if len(which) > MOVES_NAMED else ""
    return [
        f"{len(which)} requests moved to another rank in the last {MOVES_TOLD_S:.0f} s, since "
        f"theirs died or stopped, and went on there; the last: {last}{more}"
    ]


class WatchedEngine:
    """An engine that remembers when it last brought a token."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.last_token_s: float | None = None  # time.monotonic()

    @property
    def fingerprint(self) -> str:
        return self._engine.fingerprint

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        deltas = self._engine.generate(request)
        try:
            async for delta in deltas:
                if delta.tokens:
                    self.last_token_s = time.monotonic()
                yield delta
        finally:
            await deltas.aclose()


class Readiness:
    def __init__(
        self,
        engine: WatchedEngine,
        settings: ApiSettings,
        probe_id: int,
        problems: Callable[[], list[str]],
    ) -> None:
        """`probe_id`: a token to start the probe's prompt with (BOS)."""
        self._engine, self._settings, self._probe_id = engine, settings, probe_id
        self._problems = problems
        self._probe: asyncio.Task[str | None] | None = None

    async def check(self) -> dict[str, object]:
        """{"ready": bool, ...}: a token came within the window, or a probe brings one in time.

        "degraded": what is missing meanwhile, in sentences; absent when nothing is.
        """
        reason = None
        if not self._fresh():
            # Callers who come together share one probe.
            if self._probe is None or self._probe.done():
                self._probe = asyncio.create_task(self._ask())
            reason = await asyncio.shield(self._probe)
        last = self._engine.last_token_s
        age = None if last is None else round(time.monotonic() - last, 3)
        state: dict[str, object] = {"ready": reason is None, "last_token_age_s": age}
        if problems := self._problems():
            state["degraded"] = problems
        return state if reason is None else {**state, "reason": reason}

    def _fresh(self) -> bool:
        last = self._engine.last_token_s
        return last is not None and time.monotonic() - last <= self._settings.ready_window_s

    async def _ask(self) -> str | None:
        """None if a token came, else why not."""
        request = Request(
            id=f"probe-{uuid.uuid4()}",
            prompt_ids=(self._probe_id,),
            sampling=SamplingParams(max_tokens=1, temperature=0.0),
        )
        try:
            async with asyncio.timeout(self._settings.probe_timeout_s):
                async for delta in self._engine.generate(request):
                    if delta.finish in (FinishReason.STOP, FinishReason.LENGTH):
                        # A stop token that the engine keeps to itself is a token too.
                        self._engine.last_token_s = time.monotonic()
                        return None
                    if delta.finish is not None:
                        return f"a probe token failed: {delta.error or delta.finish}"
                return "a probe token failed: the engine sent nothing"
        except TimeoutError:
            return f"no token within {self._settings.probe_timeout_s:g} s"
        except Exception as error:
            return f"a probe token failed: {error}"
