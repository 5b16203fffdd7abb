"""The rank that computes pages for others: hands over each page as soon as it is final.

A fetch is a request of the engine that samples nothing. After every step, the pages of its chain
that have come into the prefix cache are held, announced on the fetch's stream and sent; they are
held until the other end has left, so that a page that was damaged on its way can be sent again.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import torch

from rayseek.cluster.engine import Command, Engine
from rayseek.cluster.group import ExchangeBroken, Group, join_store
from rayseek.cluster.request import Delta, Request, RequestRefused, SamplingParams
from rayseek.cluster.sequence import Sequence
from rayseek.cluster.tokens_pb2 import (
    Again,
    Coming,
    Failed,
    FromSource,
    Pair,
    ToSource,
    Want,
    Working,
)
from rayseek.cluster.traces import record
from rayseek.cluster.transfer_counters import TransferCounters
from rayseek.model.batch import PAGE_TOKENS
from rayseek.model.latent_cache import LatentCache, checksums

log = logging.getLogger("rayseek.transfer")

SAY_S = 1.0  # who waits hears so often that the steps go on, or four times before it gives up
MOST_AT_ONCE = 16 * 2**20  # bytes of one exchange, if a page is not more


def pages_at_once(page_words: int) -> int:
    """Pages in one exchange: both ends keep room for so many."""
    return max(1, min(16, MOST_AT_ONCE // (4 * page_words)))


@dataclass(slots=True, eq=False)
class _Wanted:
    """One fetch. found: pages of its chain that are final; held: of these, those to be sent."""

    handle: int
    first_page: int
    sequence: Sequence
    outgoing: queue.SimpleQueue[_Pages | FromSource | None]
    began: float = field(default_factory=time.monotonic)
    found: int = 0
    held: list[int] = field(default_factory=list)
    left: bool = False

    @property
    def cached_tokens(self) -> int:
        """What nobody computed for this fetch: what its sequence found, or need not look for."""
        cached = self.sequence.cached_tokens
        return self.found * PAGE_TOKENS if cached is None else cached


@dataclass(frozen=True, slots=True)
class _Pages:
    """To be sent in one exchange."""

    wanted: _Wanted
    first_page: int
    pages: tuple[int, ...]
    cached_tokens: int


class PageSource:
    """One for a rank. `serve` runs in a thread of the gRPC server, once for each other end.

    post: runs a command in the engine's thread. timeout_s: how long an exchange may take.
    host: this rank's address, for pages to be sent from.
    """

    host = "127.0.0.1"

    def __init__(
        self,
        cache: LatentCache,
        fingerprint: str,
        post: Callable[[Command], None],
        timeout_s: float,
        counters: TransferCounters,
    ) -> None:
        self._cache, self._fingerprint = cache, fingerprint
        self._post, self._timeout_s, self._counters = post, timeout_s, counters
        self._numbers = itertools.count()
        self._wanted: dict[str, _Wanted] = {}  # by the engine's request id
        self._said, self._steps = 0.0, 0  # when it was last said that steps go on, and how many

    # ---- in the engine's thread ----

    @property
    def active(self) -> bool:
        """Whether anybody waits for pages of ours."""
        return bool(self._wanted)

    def after_step(self, engine: Engine, deltas: list[Delta]) -> None:
        """Send what has become final; tell of requests that ended too early."""
        for wanted in self._wanted.values():
            self._advance(engine, wanted)
        for delta in deltas:
            ended = self._wanted.get(delta.request_id) if delta.finish else None
            if ended is not None and ended.found < len(ended.sequence.chain):
                why = delta.error or "some of its pages were withdrawn"
                ended.outgoing.put(failed(ended.handle, why))
        self._say_that_it_works(engine.steps)

    def _say_that_it_works(self, steps: int) -> None:
        """A queue is long, or a prompt is: whoever waits would only make it worse elsewhere."""
        now = time.monotonic()
        if steps == self._steps or now - self._said < min(SAY_S, self._timeout_s / 4):
            return
        self._said, self._steps = now, steps
        waiting: dict[Any, list[int]] = defaultdict(list)
        for wanted in self._wanted.values():
            if wanted.found < len(wanted.sequence.chain):
                waiting[wanted.outgoing].append(wanted.handle)
        for outgoing, handles in waiting.items():
            outgoing.put(FromSource(working=Working(handles=handles)))

    def _begin(self, engine: Engine, name: str, outgoing: Any, want: Want) -> None:
        request = Request(
            name, tuple(want.ids), SamplingParams(max_tokens=0), want.cache_salt, want.priority,
            trace=want.trace,
        )  # fmt: skip
        try:
            sequence = engine.park(request)
        except RequestRefused as refusal:
            outgoing.put(failed(want.handle, refusal.reason))
            return
        wanted = _Wanted(want.handle, want.first_page, sequence, outgoing)
        self._wanted[name] = wanted
        engine.unpark(name)
        self._advance(engine, wanted)

    def _advance(self, engine: Engine, wanted: _Wanted) -> None:
        chain = wanted.sequence.chain
        if wanted.found == len(chain):
            return
        pages = engine.pool.look_up(chain[wanted.found :]).pages
        fresh = pages[max(0, wanted.first_page - wanted.found) :]
        wanted.found += len(pages)
        engine.pool.hold(fresh)
        first, step = wanted.first_page + len(wanted.held), pages_at_once(self._cache.page_words)
        wanted.held += fresh
        for i in range(0, len(fresh), step):
            batch = fresh[i : i + step]
            wanted.outgoing.put(_Pages(wanted, first + i, batch, wanted.cached_tokens))
        if wanted.found == len(chain):
            record(
                "prefill for another rank", wanted.sequence.request.trace, wanted.began,
                time.monotonic(), rayseek__pages=len(chain),
                rayseek__cached_tokens=wanted.cached_tokens,
            )  # fmt: skip
            engine.cancel(wanted.sequence.request.id)  # others may have computed it for us

    def _again(self, name: str, again: Again) -> None:
        wanted = self._wanted.get(name)
        index = again.page - wanted.first_page if wanted else -1
        if wanted is not None and 0 <= index < len(wanted.held):
            page = wanted.held[index]
            wanted.outgoing.put(_Pages(wanted, again.page, (page,), wanted.cached_tokens))

    def _leave(self, engine: Engine, name: str) -> None:
        wanted = self._wanted.pop(name, None)
        if wanted is not None:
            wanted.left = True
            engine.cancel(name)
            engine.pool.release(wanted.held)

    # ---- in threads of the gRPC server ----

    def serve(self, requests: Iterator[Any], context: Any) -> Iterator[FromSource]:
        """Serve one rank until its stream ends, or the group with it breaks."""
        outgoing: queue.SimpleQueue[_Pages | FromSource | None] = queue.SimpleQueue()
        context.add_callback(lambda: outgoing.put(None))
        try:
            pair = next(requests).pair
        except (grpc.RpcError, StopIteration):
            return
        self._check(pair, context)
        number = next(self._numbers)
        threading.Thread(
            target=self._read, args=(number, requests, outgoing), name=f"source-{number}",
            daemon=True,
        ).start()  # fmt: skip
        group = None
        try:
            yield FromSource(ready=True)
            group = Group(
                join_store(pair.host, pair.port, self._timeout_s), pair.prefix, 1, 2,
                self._timeout_s, self._cache.device, address=self.host,
            )  # fmt: skip
            nothing = torch.empty(0, self._cache.page_words, dtype=torch.int32).to(group.device)
            while (item := outgoing.get()) is not None:
                if isinstance(item, FromSource):
                    yield item
                elif not item.wanted.left:
                    words = self._cache.read_pages(item.pages)
                    yield FromSource(
                        coming=Coming(
                            handle=item.wanted.handle,
                            first_page=item.first_page,
                            checksums=checksums(words),
                            cached_tokens=item.cached_tokens,
                        )
                    )
                    group.all_to_all(nothing, words, [0, 0], [len(words), 0], "sending").wait()
                    self._counters.add(sent=len(words))
        except ExchangeBroken as broken:
            log.warning("handing pages over to %s: %s", pair.host, broken)
            context.abort(grpc.StatusCode.ABORTED, str(broken))
        finally:
            if group is not None:
                group.close()

    def _check(self, pair: Pair, context: Any) -> None:
        ours = (self._fingerprint, self._cache.page_words)
        theirs = (pair.fingerprint, pair.page_words)
        if ours != theirs:
            context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"pages do not fit: (model, words of a page) are {ours} here and {theirs} there",
            )

    def _read(self, number: int, requests: Iterator[ToSource], outgoing: Any) -> None:
        names: set[str] = set()
        try:
            for message in requests:
                self._obey(message, f"fetch-{number}:", names, outgoing)
        except grpc.RpcError:
            pass  # the other end is gone, or this server stops
        finally:  # from now on, nothing of this stream begins
            for name in names:
                self._post(lambda engine, name=name: self._leave(engine, name))  # type: ignore[misc]
            outgoing.put(None)

    def _obey(self, message: ToSource, prefix: str, names: set[str], outgoing: Any) -> None:
        kind = message.WhichOneof("kind")
        if kind == "want":
            want, name = message.want, f"{prefix}{message.want.handle}"
            names.add(name)
            self._post(lambda engine: self._begin(engine, name, outgoing, want))
        elif kind == "again":
            again, name = message.again, f"{prefix}{message.again.handle}"
            self._post(lambda engine: self._again(name, again))
        elif kind == "leave":
            name = f"{prefix}{message.leave}"
            names.discard(name)
            self._post(lambda engine: self._leave(engine, name))


def failed(handle: int, why: str) -> FromSource:
    """The message that nothing more will come for a fetch."""
    return FromSource(failed=Failed(handle=handle, message=why))
