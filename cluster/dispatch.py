"""The ingress's end of the token channel: choose a rank, keep a journal, carry on after a death.

Every request has a journal entry with all that is needed to continue it elsewhere: prompt,
sampling parameters with the seed, and the ids emitted so far. When a rank dies, its requests are
submitted again, to another rank or to its successor; since tokens depend on nothing but the
request, the client sees a pause and the same text.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from random import Random
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import grpc
import grpc.aio

from rayseek.cluster.credentials import credentials
from rayseek.cluster.request import Delta, FinishReason, Request, RequestRefused, Token
from rayseek.cluster.tokens_pb2 import REFUSED, RUNNING, Frame, Load, ToRank, Update
from rayseek.cluster.traces import record
from rayseek.cluster.wire import (
    CHANNEL_OPTIONS,
    METHOD,
    SERVICE,
    delta_of,
    plain_token,
    submit_message,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

log = logging.getLogger("rayseek.dispatch")
Count = TypeVar("Count", int, "NDArray[np.int64]")  # of one rank, or of many

ANSWER_S = 1.0  # discovery gives new ranks so long to answer; the next round sees later ones
CONTINUATION_RETRY_S = 0.2
MOVED_PATIENCE_S = 1800.0  # the successor of a whole unit loads 671B first
MAX_DEATHS = 3  # a request that was on board this many dying ranks is not given to another,
INNOCENT_TOKENS = 8  # unless it got so many tokens there before: no rank dies so late of a request
MOVES_KEPT = 1000  # of those that `moved_lately` tells of


@dataclass(frozen=True, slots=True)
class RankAddress:
    """Where a rank listens. `name` is new for every process, so a successor is another rank."""

    name: str
    target: str  # host:port
    prefills: bool = False  # it computes prompts for others, and makes no tokens itself


News: TypeAlias = Update | Token | None  # an update, one more token, or the end of the stream


class Inbox(asyncio.Queue[News]):
    """What a rank has told of a request. on_end: as in Request."""

    _queue: deque[News]  # asyncio's, for subclasses

    def __init__(self, on_end: Callable[[int], None] | None) -> None:
        super().__init__()
        self._on_end = on_end

    def end(self) -> None:
        """The last news is in."""
        if self._on_end is not None:
            self._on_end(sum(len(n.ids) if isinstance(n, Update) else 1 for n in self._queue if n))


Discover = Callable[[], Awaitable[list[RankAddress]]]


def pressure(ours: Count, waiting: Count, pages_held: Count) -> tuple[Count, Count]:
    """Of a rank that makes tokens: requests of ours there and its queue, then the pages it holds.
    The next request goes where it is smallest."""
    return ours + waiting, pages_held


def backlog(queued: Count, named: Count) -> Count:
    """Of a rank that computes prompts: tokens in its queue, and those that it was named for by us
    and may still compute. The next prompt goes where it is smallest."""
    return queued + named


def candidates(ranks: int, draw: Random) -> list[int]:
    """Of so many ranks that compute prompts, the two that one prompt may go to.

    Ingresses learn of each other's prompts only when a step ends. If each took the least of all,
    all would take the same few; of two at random they do not, and long queues still are avoided.
    """
    return draw.sample(range(ranks), min(2, ranks))


class RankLost(Exception):
    """The stream to a rank ended while a request was on it."""


@dataclass(slots=True)
class JournalEntry:
    """What has been delivered of a request, and how often it had to move elsewhere."""

    request: Request
    emitted: list[int] = field(default_factory=list)
    cached_tokens: int | None = None
    moves: int = 0  # times that it lost its rank
    deaths: int = 0  # of these, ranks that it may have killed; others had said that they stop

    def continuation(self) -> Request:
        """The request as the next rank must see it."""
        return replace(self.request, emitted_ids=(*self.request.emitted_ids, *self.emitted))

    def record(self, delta: Delta) -> Delta:
        """Note a delta before it is passed on. Usage keeps the first rank's cache count."""
        self.emitted += [token.id for token in delta.tokens]
        if self.cached_tokens is None:
            self.cached_tokens = delta.cached_tokens
        return replace(delta, cached_tokens=self.cached_tokens)


class RankChannel:
    """One open stream to one rank, shared by all requests of this ingress on it."""

    def __init__(self, address: RankAddress) -> None:
        self.address = address
        self.load = Load()
        self.fingerprint = ""
        self.alive = False
        self.retired = False  # it gave its requests back, since it is to stop
        self.prefilling = 0  # prompt tokens of ours that it was named for, and may still compute
        self._inboxes: dict[int, Inbox] = {}  # of requests that this rank still has
        self._next_handle = 0
        self._outgoing: asyncio.Queue[ToRank | None] = asyncio.Queue()
        self._channel = grpc.aio.insecure_channel(address.target, options=CHANNEL_OPTIONS)
        self._reader = asyncio.create_task(self._read())
        self.ready = asyncio.Event()  # set when connected, or when that failed

    @property
    def pressure(self) -> tuple[int, int]:
        return pressure(len(self._inboxes), self.load.waiting, self.load.pages_held)

    def submit(self, request: Request, source: str = "") -> tuple[int, Inbox]:
        """source: of the prompt's pages (wire.py). Raises ValueError, and nothing is held then, for
        what the message's fields cannot carry."""
        self._next_handle += 1
        handle = self._next_handle
        message = ToRank(submit=submit_message(handle, request, source))
        inbox = self._inboxes[handle] = Inbox(request.on_end)
        self._outgoing.put_nowait(message)
        return handle, inbox

    def forget(self, handle: int, finished: bool) -> None:
        """The request is over here; unless the rank knows, tell it."""
        self._inboxes.pop(handle, None)
        if not finished and self.alive:
            self._outgoing.put_nowait(ToRank(cancel=handle))

    async def close(self) -> None:
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader
        await self._channel.close()

    def _pass_on(self, handle: int, news: News) -> None:
        inbox = self._inboxes.get(handle)
        if inbox is not None:
            inbox.put_nowait(news)

    def _over(self, last: Update) -> None:
        """The rank has done with a request, whether its reader has come that far or not."""
        inbox = self._inboxes.pop(last.handle, None)
        if inbox is not None and last.finish != REFUSED:
            inbox.end()

    async def _write(self) -> AsyncIterator[ToRank]:
        while (message := await self._outgoing.get()) is not None:
            yield message

    async def _read(self) -> None:
        call = self._channel.stream_stream(
            f"/{SERVICE}/{METHOD}",
            request_serializer=ToRank.SerializeToString,
            response_deserializer=Frame.FromString,
        )(self._write(), metadata=credentials())
        try:
            async for frame in call:
                if not self.alive:
                    self.alive, self.fingerprint = True, frame.fingerprint
                    self.ready.set()
                self.load = frame.load
                codes = frame.drafts or [0] * len(frame.ids)
                for handle, token_id, code in zip(frame.handles, frame.ids, codes, strict=True):
                    self._pass_on(handle, plain_token(token_id, code))
                for update in frame.updates:
                    self._pass_on(update.handle, update)
                    if update.finish != RUNNING:
                        self._over(update)
            self.retired = True
        except grpc.aio.AioRpcError as error:
            log.warning("rank %s lost: %s", self.address.name, error.details())
        finally:
            self.alive = False
            self.ready.set()
            call.cancel()
            self._outgoing.put_nowait(None)  # ends gRPC's task that sends
            for inbox in self._inboxes.values():
                inbox.put_nowait(None)


@dataclass(slots=True)
class Naming:
    """That a rank was named as the source of a prompt's pages; counted until there is news."""

    source: RankChannel | None
    tokens: int

    @property
    def target(self) -> str:
        return self.source.address.target if self.source else ""

    def begin(self) -> None:
        if self.source is not None:
            self.source.prefilling += self.tokens

    def over(self) -> None:
        """The prompt is computed, or the request has left. Idempotent."""
        if self.source is not None:
            self.source.prefilling -= self.tokens
            self.source = None


class Dispatcher:
    """`generate` over all ranks that `discover` knows of.

    patience_s: how long a request waits for a rank to come before it is refused. One that has begun
    waits for MOVED_PATIENCE_S: its client would rather have the rest late than not at all.
    """

    def __init__(
        self,
        discover: Discover,
        patience_s: float = 120.0,
        refresh_s: float = 2.0,
        moved_patience_s: float = MOVED_PATIENCE_S,
    ) -> None:
        self._discover = discover
        self._patience_s, self._moved_patience_s = patience_s, moved_patience_s
        self._refresh_s = refresh_s
        self._channels: dict[str, RankChannel] = {}
        self._wanted = asyncio.Event()
        self._changed = asyncio.Condition()
        self._fingerprint = ""
        self.moved = 0  # requests that went on elsewhere after their rank had died or stopped
        self._moves: deque[tuple[float, str]] = deque(maxlen=MOVES_KEPT)  # when, and which
        self._listed: set[str] = set()  # by a unit that lives; the others finish what they have
        self._draw = Random()
        self._refresher = asyncio.create_task(self._keep_fresh())

    async def close(self) -> None:
        self._refresher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._refresher
        for channel in self._channels.values():
            await channel.close()

    @property
    def fingerprint(self) -> str:
        """Which model answers: the ranks' own word, all of theirs where they differ; "" before
        the first rank was seen."""
        if alive := {c.fingerprint for c in self._alive()}:
            self._fingerprint = "+".join(sorted(alive))
        return self._fingerprint

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        """The request's deltas, the last of which carries `finish`.

        Closing the iterator cancels the request. Raises RequestRefused when no rank takes it.
        """
        entry = JournalEntry(request)
        refused_by: set[str] = set()
        while True:
            patience = self._moved_patience_s if entry.moves else self._patience_s
            before = len(entry.emitted)
            channel = await self._choose(refused_by, patience)
            try:
                async with contextlib.aclosing(self._on_rank(channel, entry)) as deltas:
                    async for delta in deltas:
                        yield delta
                return
            except RankLost:
                entry.moves += 1
                if not channel.retired and len(entry.emitted) - before < INNOCENT_TOKENS:
                    entry.deaths += 1
                self.moved += 1
                self._moves.append((time.monotonic(), request.id))
                now = time.monotonic()
                record("lost its rank", request.trace, now, now, rayseek__rank=channel.address.name)
                log.warning("request %s moves on after %d tokens", request.id, len(entry.emitted))
                if entry.deaths >= MAX_DEATHS:
                    yield entry.record(
                        Delta(
                            request.id,
                            finish=FinishReason.ERROR,
                            error=f"{entry.deaths} ranks died while running this request",
                        )
                    )
                    return
            except RequestRefused as refusal:
                refused_by.add(channel.address.name)
                others = [c for c in self._alive() if c.address.name not in refused_by]
                if others and refusal.retryable:
                    continue
                if not (refusal.retryable and entry.moves):
                    raise
                # It was running when it lost its rank: a full queue elsewhere is a reason to wait
                # for a place, not to break off an answer that has begun.
                refused_by.clear()
                await asyncio.sleep(CONTINUATION_RETRY_S)

    async def _on_rank(
        self, channel: RankChannel, entry: JournalEntry
    ) -> AsyncGenerator[Delta, None]:
        request = entry.continuation()
        naming = Naming(self._source(), len(request.prompt_ids) + len(request.emitted_ids))
        handle, inbox = channel.submit(request, naming.target)
        naming.begin()
        finished = False
        try:
            while not finished:
                news = await inbox.get()
                naming.over()
                delta: Delta | None = None
                while news is not None:
                    more, finished = _read(news, entry.request.id)
                    delta = more if delta is None else _merge(delta, more)
                    if finished or inbox.empty():  # else a slow reader catches up in one go
                        break
                    news = inbox.get_nowait()
                if delta is not None:
                    yield entry.record(delta)
                if news is None:
                    raise RankLost(channel.address.name)
        finally:
            naming.over()
            channel.forget(handle, finished)

    def moved_lately(self, within_s: float) -> list[str]:
        """Ids of the requests that moved in the last seconds, the newest last."""
        since = time.monotonic() - within_s
        return [request_id for at, request_id in self._moves if at >= since]

    def _alive(self, prefills: bool = False) -> list[RankChannel]:
        """The live ranks that make tokens, or those that compute prompts for them. Of these, the
        ranks of units that stop or have lost their leader are left out if there are others."""
        channels = self._channels.values()
        alive = [c for c in channels if c.alive and c.address.prefills == prefills]
        return [c for c in alive if c.address.name in self._listed] or alive

    def _source(self) -> RankChannel | None:
        """Who would be the first to have computed another prompt; None: nobody prefills."""
        ranks = self._alive(prefills=True)
        return min(
            (ranks[i] for i in candidates(len(ranks), self._draw)),
            key=lambda c: backlog(c.load.prompt_tokens_queued, c.prefilling),
            default=None,
        )

    async def _choose(self, refused_by: set[str], patience_s: float) -> RankChannel:
        """The least loaded live rank; waits for one if there is none."""
        deadline = time.monotonic() + patience_s
        while True:
            alive = self._alive()
            willing = [c for c in alive if c.address.name not in refused_by] or alive
            if willing:
                return min(willing, key=lambda c: (c.pressure, self._draw.random()))
            self._wanted.set()
            try:
                async with asyncio.timeout(deadline - time.monotonic()), self._changed:
                    await self._changed.wait()
            except TimeoutError:
                raise RequestRefused(
                    f"no rank is up, and none came within {patience_s:.0f} s; see the "
                    "Serve page of the dashboard for the unit's state",
                    retry_after_s=5.0,
                ) from None

    async def _keep_fresh(self) -> None:
        """Connect to ranks that appear, drop those that are gone; hurry while one is wanted."""
        problem = ""
        while True:
            try:
                await self._refresh()
                problem = ""
            except Exception as error:  # discovery goes through the cluster; it may be recovering
                if repr(error) != problem:
                    problem = repr(error)
                    log.warning("cannot look for ranks, trying again: %s", problem)
            pause = self._refresh_s
            if not self._alive():
                pause = min(0.1, pause)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._wanted.wait()
                    self._wanted.clear()
                    await asyncio.sleep(min(0.1, pause))

    async def _refresh(self) -> None:
        known = {address.name: address for address in await self._discover()}
        self._listed = set(known)
        for name, channel in list(self._channels.items()):
            if channel.ready.is_set() and not channel.alive:
                del self._channels[name]
                await channel.close()
        new = [RankChannel(a) for name, a in known.items() if name not in self._channels]
        for channel in new:
            self._channels[channel.address.name] = channel
        if new:  # the first answer is enough: a rank that is silent delays nobody
            answers = [asyncio.create_task(channel.ready.wait()) for channel in new]
            await asyncio.wait(answers, timeout=ANSWER_S, return_when=asyncio.FIRST_COMPLETED)
            for answer in answers:
                answer.cancel()
        if self._alive():  # not only new ones: some answer after their round
            async with self._changed:
                self._changed.notify_all()


def _read(news: Update | Token, request_id: str) -> tuple[Delta, bool]:
    """A piece of news as a delta, and whether it is the last."""
    if isinstance(news, Token):
        return Delta(request_id, (news,)), False
    return delta_of(news, request_id), news.finish != 0


def _merge(first: Delta, second: Delta) -> Delta:
    tokens: tuple[Token, ...] = first.tokens + second.tokens
    return Delta(
        first.request_id,
        tokens,
        second.finish,
        first.cached_tokens if second.cached_tokens is None else second.cached_tokens,
        second.error,
    )
