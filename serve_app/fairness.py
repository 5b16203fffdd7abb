"""Fair queueing by key, in front of the engine.

`FairQueue` decides and knows no time: start-time fair queueing. Each key has a virtual clock that
its requests move on by their work in tokens; the key that is furthest behind goes next. Work is
guessed when a request starts and corrected when it ends. A key that comes back from a pause starts
at the present virtual time: idling saves up nothing.

The engine is never given more than it can run at once, so nothing queues up behind it. While
others have keys too, no key alone may take more than three quarters of that: somebody who
asks now does not have to wait until a flood's long answers end. And while somebody with modest
needs is there, a key may take no more than `crowd` of it: how long an answer's first token takes is
how long the engine's steps are, and those grow with what runs in them.

`FairEngine` is the same as an engine: it holds requests back, and counts what they use.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field, replace

from rayseek.cluster.request import Delta, Request, RequestRefused
from rayseek.serve_app.engine_port import Engine
from rayseek.serve_app.limits import Lease
from rayseek.serve_app.observer import Observer, Sighting

FIRST_GUESS = 256.0  # tokens of an answer, before a key has had one
MEMORY = 0.2  # weight of the newest answer in a key's mean
PRESENT_S = 10.0  # a key that asked this recently is there


@dataclass(slots=True, eq=False)
class Ticket:
    """One request in the queue or at the engine."""

    key: str
    prompt: int  # tokens
    limit: int  # most tokens of the answer
    running: bool = False
    cost: float | None = None  # as guessed when it started; None: it waits
    made: int = 0  # tokens, read by the caller or not


@dataclass(slots=True)
class _Flow:
    """What is known of one key."""

    clock: float = 0.0
    asked: float = -math.inf  # time of the last request
    running: int = 0
    waiting: list[tuple[int, int, Ticket]] = field(default_factory=list)  # heap: priority, arrival
    answer: float = FIRST_GUESS  # mean tokens of an answer


class FairQueue:
    """Which request goes to the engine next. Times are arguments, in seconds."""

    def __init__(self, slots: int, crowd: float = 1.0) -> None:
        """Not more than `slots` are at the engine at once."""
        self._share = crowd
        self.resize(slots)
        self._now = 0.0  # virtual time: the clock of the key that was served last
        self._flows: dict[str, _Flow] = {}
        self._arrivals = 0
        self._running = 0

    def resize(self, slots: int) -> None:
        self.slots, self._crowd = slots, max(1, int(slots * self._share))

    @property
    def in_all(self) -> int:
        """Requests at the engine."""
        return self._running

    def waiting(self, key: str) -> int:
        return len(self._flows[key].waiting) if key in self._flows else 0

    def running(self, key: str) -> int:
        return self._flows[key].running if key in self._flows else 0

    def push(self, ticket: Ticket, now: float, priority: int = 0) -> None:
        """Among one key's own requests a lower `priority` goes first, then the earlier one."""
        flow = self._flows.setdefault(ticket.key, _Flow(self._now))
        flow.asked = now
        self._arrivals += 1
        heapq.heappush(flow.waiting, (priority, self._arrivals, ticket))

    def pop(self, now: float, several_keys: bool) -> Ticket | None:
        """The next request to start; None if all must wait. Not `several_keys`: no reserve."""
        if self._running >= self.slots:
            return None
        most = max(1, self.slots * 3 // 4) if several_keys else self.slots
        # Modest: it asked a moment ago, and got all it wanted.
        modest = [f for f in self._flows.values() if not f.waiting and now - f.asked < PRESENT_S]
        if modest:
            most = min(most, self._crowd)
        ready = [flow for flow in self._flows.values() if flow.waiting and flow.running < most]
        if not ready:
            return None
        flow = min(ready, key=lambda f: (max(f.clock, self._now), f.running, f.waiting[0][1]))
        ticket = heapq.heappop(flow.waiting)[2]
        self._now = max(flow.clock, self._now)
        ticket.running, ticket.cost = True, ticket.prompt + min(flow.answer, ticket.limit)
        flow.clock = self._now + ticket.cost
        flow.running += 1
        self._running += 1
        return ticket

    def free(self, ticket: Ticket) -> None:
        """The engine has done with it: its place is another's. Harmless twice."""
        if ticket.running:
            ticket.running = False
            self._flows[ticket.key].running -= 1
            self._running -= 1

    def remove(self, ticket: Ticket, made: int, whole: bool) -> None:
        """It is over, with `made` tokens. Not `whole`: it says nothing of the key's answers."""
        self.free(ticket)
        flow = self._flows[ticket.key]
        if ticket.cost is not None:
            flow.clock += ticket.prompt + made - ticket.cost
            if whole:
                flow.answer += MEMORY * (made - flow.answer)
        else:
            flow.waiting = [entry for entry in flow.waiting if entry[2] is not ticket]
            heapq.heapify(flow.waiting)


class FairEngine:
    """Admits requests to `engine` in the queue's order."""

    def __init__(
        self,
        engine: Engine,
        slots: int,
        max_waiting: int,
        several_keys: Callable[[], bool],
        crowd: float = 1.0,
        observer: Observer | None = None,
        shared_cache: bool = False,
    ) -> None:
        """`slots`: sequences the engine may have at once; `max_waiting`: of one key, at most.
        Not `shared_cache`: no key is served what was computed for another's prompt."""
        self._engine, self._several_keys = engine, several_keys
        self._queue = FairQueue(slots, crowd)
        self._observer = observer or Observer()
        self._max_waiting, self._shared_cache = max_waiting, shared_cache
        self._doors: dict[Ticket, asyncio.Future[None]] = {}
        self._service_s: dict[str, float] = {}  # mean time that a key's request is at the engine

    @property
    def fingerprint(self) -> str:
        return self._engine.fingerprint

    @property
    def load(self) -> tuple[int, int]:
        """Sequences at the engine, and waiting for it."""
        running = self._queue.in_all
        return running, len(self._doors) - running

    def resize(self, slots: int) -> None:
        """The engine may have so many from now on. Called now and then, for places are also free
        once a key with modest needs is no longer there."""
        self._queue.resize(slots)
        self._admit()

    def of(self, lease: Lease) -> Engine:
        """The engine as the holder of `lease` sees it."""
        return _Share(self, lease)

    async def generate(self, request: Request, lease: Lease) -> AsyncGenerator[Delta, None]:
        """Like `Engine.generate`. Raises RequestRefused if too many of the key wait already."""
        with self._observer.sequence(request, lease.key.name, lease.arrived) as seen:
            deltas = self._generate(replace(request, trace=seen.trace), lease, seen)
            try:
                async for delta in deltas:
                    seen.took(delta)
                    yield delta
            finally:
                await deltas.aclose()

    async def _generate(
        self, request: Request, lease: Lease, seen: Sighting
    ) -> AsyncGenerator[Delta, None]:
        ticket = self._enter(request, lease)
        read, began, ended = 0, math.inf, False

        def made(tokens: int) -> None:
            lease.paid_tokens(tokens - ticket.made)
            ticket.made = tokens

        def end(unread: int) -> None:
            """All is made: who reads slowly, or not at all, pays for it and keeps no place."""
            made(read + unread)
            self._free(ticket)

        try:
            lease.waiting += 1
            try:
                await self._doors[ticket]
            finally:
                lease.waiting -= 1
            lease.begun += 1
            began = time.monotonic()
            seen.begins(lease.paid_prompt(request))
            salt = request.cache_salt if self._shared_cache else ticket.key + request.cache_salt
            # A key's priorities are among its own: in the engine they would pass other keys' by.
            ours = replace(request, priority=0, cache_salt=salt, on_end=end)
            deltas = self._engine.generate(ours)
            try:
                async for delta in deltas:
                    read += len(delta.tokens)
                    if read > ticket.made:
                        made(read)
                    ended = delta.finish is not None
                    yield delta
            finally:
                await deltas.aclose()
        finally:
            self._leave(ticket, ended, time.monotonic() - began)

    def _enter(self, request: Request, lease: Lease) -> Ticket:
        key, queue = lease.key.sha256, self._queue
        waiting = queue.waiting(key)
        if waiting >= self._max_waiting:
            rounds = waiting / max(1, queue.running(key))
            raise RequestRefused(
                f"{waiting} requests of this key are waiting already; please try again later",
                retry_after_s=min(600.0, rounds * self._service_s.get(key, 1.0)),
            )
        ticket = Ticket(key, len(request.prompt_ids), request.sampling.max_tokens)
        self._doors[ticket] = asyncio.get_running_loop().create_future()
        queue.push(ticket, time.monotonic(), request.priority)
        self._admit()
        return ticket

    def _free(self, ticket: Ticket) -> None:
        """Its place is another's."""
        self._queue.free(ticket)
        self._doors.pop(ticket, None)
        self._admit()

    def _leave(self, ticket: Ticket, whole: bool, service_s: float) -> None:
        self._queue.remove(ticket, ticket.made, whole)
        if whole:
            mean = self._service_s.get(ticket.key, service_s)
            self._service_s[ticket.key] = mean + MEMORY * (service_s - mean)
        self._free(ticket)

    def _admit(self) -> None:
        now, several = time.monotonic(), self._several_keys()
        while (ticket := self._queue.pop(now, several)) is not None:
            door = self._doors[ticket]
            if not door.done():  # cancelled in this very moment: it leaves by itself
                door.set_result(None)


@dataclass(frozen=True, slots=True)
class _Share:
    engine: FairEngine
    lease: Lease

    @property
    def fingerprint(self) -> str:
        return self.engine.fingerprint

    def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        return self.engine.generate(request, self.lease)
