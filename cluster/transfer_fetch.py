"""The rank that fetches: a request waits outside the queue until its prompt's pages have come.

There is one connection (`_Pair`) per source, made when it is first needed: a stream on which
everything is said in order, and a process group of two for the pages. A page arrives in a staging
buffer, and only one with the right checksum is copied into a page of ours, which nobody else may
touch meanwhile. Three things can go wrong, and are kept apart: a request's fetch (it alone goes on
with what it has), a page (it is asked for once more), and the connection (all its fetches go on
with what they have, and the source is left alone for a while).
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import grpc
import torch
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from rayseek.cluster.config import TransferSettings
from rayseek.cluster.dispatch import CHANNEL_OPTIONS
from rayseek.cluster.engine import Engine
from rayseek.cluster.group import ExchangeBroken, Group, open_store
from rayseek.cluster.precedence import give_way
from rayseek.cluster.request import Request
from rayseek.cluster.sequence import Sequence
from rayseek.cluster.tokens_pb2 import Again, Coming, FromSource, Pair, ToSource, Want
from rayseek.cluster.transfer_counters import TransferCounters
from rayseek.cluster.transfer_source import pages_at_once
from rayseek.cluster.wire import FETCH, SERVICE
from rayseek.model.batch import PAGE_TOKENS
from rayseek.model.latent_cache import LatentCache, checksums

log = logging.getLogger("rayseek.transfer")

REST_S = 5.0  # a source whose connection was lost or given up is not asked for so long
MOST_SILENCES = 2  # fetches in a row that heard nothing in time; then the source is given up

Command: TypeAlias = Callable[[Engine], None]


@dataclass(slots=True, eq=False)
class _Fetch:
    """A request whose pages are to come from `source`.

    local: pages of its chain that were cached here; pages: taken for those that follow. Both are
    held from the moment that the fetch has begun. The lock is for what arrives.
    """

    sequence: Sequence
    source: str
    asked: float
    heard: float  # when it last heard anything, or was asked for
    handle: int = 0
    pair: _Pair | None = None
    local: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    arrived: set[int] = field(default_factory=set)  # indices into `pages`
    repeated: set[int] = field(default_factory=set)
    cached_tokens: int = 0  # at the source
    ended: bool = False

    @property
    def key(self) -> str:
        return self.sequence.request.id

    @property
    def usable(self) -> int:
        """Pages that came without a gap."""
        return next(i for i in itertools.count() if i not in self.arrived)


class PageFetcher:
    """One for a rank. Its public methods are for the engine's thread, but for `close`.

    host: where sources find the key-value store that this rank offers.
    """

    host = "127.0.0.1"

    def __init__(
        self,
        cache: LatentCache,
        fingerprint: str,
        settings: TransferSettings,
        post: Callable[[Command], None],
        counters: TransferCounters,
    ) -> None:
        self.cache, self.fingerprint, self.settings = cache, fingerprint, settings
        self.post, self.counters = post, counters
        self._fetches: dict[str, _Fetch] = {}  # by request id, in order of arrival
        self._pairs: dict[str, _Pair] = {}  # by source
        self._resting: dict[str, float] = {}  # source -> until when
        self._handles = itertools.count(1)
        self._closed = threading.Event()
        self._clerk: threading.Thread | None = None
        self._store: TCPStore | None = None

    def submit(self, engine: Engine, request: Request, source: str) -> None:
        """Queue a request after its pages have come, or at once if that is not worth while.

        Raises RequestRefused, as the engine does.
        """
        now = time.monotonic()
        sequence = engine.park(request)
        if self._resting.get(source, now) > now:
            self.counters.add(fallbacks=1)
            engine.unpark(request.id)
            return
        self._resting.pop(source, None)
        cached = len(engine.pool.look_up(sequence.chain).pages)
        unknown = len(sequence.ids) - cached * PAGE_TOKENS
        if cached == len(sequence.chain) or unknown < self.settings.min_prompt_tokens:
            engine.unpark(request.id)
            return
        self._fetches[request.id] = _Fetch(sequence, source, now, now)
        if self._clerk is None:
            self._clerk = threading.Thread(target=self._watch, name="transfers", daemon=True)
            self._clerk.start()
        self.begin_waiting(engine)

    def cancel(self, engine: Engine, request_id: str) -> None:
        """Give a fetch up, with its request; unknown ids are fine."""
        fetch = self._fetches.get(request_id)
        if fetch is not None:
            self._end(engine, fetch)

    def begin_waiting(self, engine: Engine) -> None:
        """Begin the fetches that there is room for, in their order."""
        for fetch in list(self._fetches.values()):
            if not fetch.pair and not self._begin(engine, fetch):
                return

    def close(self) -> None:
        """End every connection and thread."""
        self._closed.set()
        for pair in list(self._pairs.values()):
            pair.close()
        if self._clerk is not None:
            self._clerk.join()

    # ---- in the engine's thread ----

    def _begin(self, engine: Engine, fetch: _Fetch) -> bool:
        """Take the pages and ask for what belongs in them; False: there is no room yet."""
        chain, pool = fetch.sequence.chain, engine.pool
        match = pool.look_up(chain)
        missing = len(chain) - len(match.pages)
        if not missing:  # others have computed it here meanwhile
            del self._fetches[fetch.key]
            engine.unpark(fetch.key)
            return True
        # One page is left to each that runs: nobody is preempted for a prompt to come.
        if missing + match.idle + engine.load.running > pool.available:
            return False
        pool.hold(match.pages)
        fetch.local, fetch.pages = list(match.pages), pool.take(missing)
        fetch.handle, fetch.heard = next(self._handles), time.monotonic()
        fetch.pair = self._pairs.get(fetch.source)
        if fetch.pair is None:
            fetch.pair = self._pairs[fetch.source] = _Pair(self, fetch.source)
        fetch.pair.want(fetch)
        return True

    def _finish(self, engine: Engine, fetch: _Fetch, problem: str = "") -> None:
        """Queue its request, with the pages that came."""
        if self._fetches.get(fetch.key) is not fetch:
            return  # cancelled meanwhile, or ended otherwise
        usable = self._end(engine, fetch)
        local, prompt = len(fetch.local), fetch.sequence
        if usable:
            skipped = min(fetch.cached_tokens, (local + usable) * PAGE_TOKENS)
            prompt.cached_before = max(local * PAGE_TOKENS, skipped)
        self.counters.add(
            pages=usable,
            bytes=usable * self.cache.page_words * 4,
            seconds=time.monotonic() - fetch.asked,
        )
        if problem:
            self.counters.add(**{"partly" if usable else "fallbacks": 1})
            log.warning(
                "request %s goes on with %d of %d pages of %s: %s",
                fetch.key, usable, len(fetch.pages), fetch.source, problem,
            )  # fmt: skip
        else:
            self.counters.add(fetched=1)
        engine.unpark(fetch.key)
        self.begin_waiting(engine)

    def _end(self, engine: Engine, fetch: _Fetch) -> int:
        """Share the pages that came and let go of all; returns how many came."""
        del self._fetches[fetch.key]
        with fetch.lock:  # from now on, nobody writes to our pages
            fetch.ended = True
        if fetch.pair is None:
            return 0
        fetch.pair.leave(fetch)
        first = len(fetch.local)
        for i in range(fetch.usable):
            engine.pool.publish(fetch.pages[i], fetch.sequence.hashes[first + i])
        engine.pool.release(fetch.local + fetch.pages)
        return fetch.usable

    def _pair_over(self, engine: Engine, pair: _Pair, problem: str) -> None:
        if self._pairs.get(pair.source) is pair:
            del self._pairs[pair.source]
            self._resting[pair.source] = time.monotonic() + REST_S
            self.counters.add(broken=1)
            log.warning("lost %s as a source of pages: %s", pair.source, problem)
        for fetch in list(self._fetches.values()):
            if fetch.pair is pair or (fetch.pair is None and fetch.source == pair.source):
                self._finish(engine, fetch, problem)

    def _timed_out(self, engine: Engine, fetch: _Fetch) -> None:
        if self._fetches.get(fetch.key) is not fetch:
            return
        pair = fetch.pair
        self.counters.add(timeouts=1)
        self._finish(engine, fetch, f"nothing came for {self.settings.timeout_s:g} s")
        if pair is not None:
            pair.silences += 1
            if pair.silences >= MOST_SILENCES:
                self._pair_over(engine, pair, f"{pair.silences} fetches heard nothing")
                pair.close()

    # ---- in other threads ----

    def _watch(self) -> None:
        """The clerk: ends fetches that hear nothing for too long."""
        give_way()
        limit = self.settings.timeout_s
        while not self._closed.wait(min(0.5, limit / 10)):
            now = time.monotonic()
            for fetch in list(self._fetches.values()):
                if now - fetch.heard > limit:
                    self.post(lambda engine, fetch=fetch: self._timed_out(engine, fetch))  # type: ignore[misc]

    def meet(self, number: int) -> Pair:
        """Where a source finds the group of our connection `number`."""
        return Pair(
            host=self.host, port=self.store.port, prefix=f"pages-{number}",
            fingerprint=self.fingerprint, page_words=self.cache.page_words,
        )  # fmt: skip

    @property
    def store(self) -> TCPStore:
        if self._store is None:
            self._store = open_store(self.host)
        return self._store


class _Pair:
    """The connection to one source. A thread of its own listens, and receives the pages."""

    _numbers = itertools.count()

    def __init__(self, fetcher: PageFetcher, source: str) -> None:
        self.source, self.silences = source, 0
        self._fetcher = fetcher
        self._meeting = fetcher.meet(next(self._numbers))
        self._outgoing: queue.SimpleQueue[ToSource | None] = queue.SimpleQueue()
        self._outgoing.put(ToSource(pair=self._meeting))
        self._fetches: dict[int, _Fetch] = {}
        words = fetcher.cache.page_words
        self._staging = torch.empty(
            pages_at_once(words), words, dtype=torch.int32, device=fetcher.cache.device
        )
        self._channel = grpc.insecure_channel(source, options=CHANNEL_OPTIONS)
        self._call = self._channel.stream_stream(
            f"/{SERVICE}/{FETCH}",
            request_serializer=ToSource.SerializeToString,
            response_deserializer=FromSource.FromString,
        )(iter(self._outgoing.get, None))
        self._thread = threading.Thread(target=self._run, name=f"fetch-{source}", daemon=True)
        self._thread.start()

    def want(self, fetch: _Fetch) -> None:
        """Ask for a fetch's pages."""
        self._fetches[fetch.handle] = fetch
        sequence = fetch.sequence
        self._outgoing.put(
            ToSource(
                want=Want(
                    handle=fetch.handle,
                    ids=sequence.ids[: len(sequence.chain) * PAGE_TOKENS + 1],
                    cache_salt=sequence.request.cache_salt,
                    priority=sequence.request.priority,
                    first_page=len(fetch.local),
                )
            )
        )

    def leave(self, fetch: _Fetch) -> None:
        """Nothing more is wanted for a fetch; what comes for it is dropped."""
        if self._fetches.pop(fetch.handle, None) is not None:
            self._outgoing.put(ToSource(leave=fetch.handle))

    def close(self) -> None:
        """Hang up. The thread ends as soon as it stands in no exchange."""
        self._call.cancel()

    def _run(self) -> None:
        give_way()
        group, problem = None, "it hung up"
        try:
            for message in self._call:
                kind = message.WhichOneof("kind")
                if kind == "ready":
                    m, f = self._meeting, self._fetcher
                    group = Group(
                        m.host, m.port, m.prefix, 0, 2, f.settings.timeout_s, f.cache.device
                    )
                elif kind == "coming":
                    assert group is not None, "ready comes first"
                    self._receive(group, message.coming)
                elif kind == "failed":
                    self._failed(message.failed.handle, message.failed.message)
        except grpc.RpcError as error:
            problem = str(error.details() if hasattr(error, "details") else error)
        except ExchangeBroken as broken:
            problem = str(broken)
        finally:
            if group is not None:
                group.close()
            self._call.cancel()
            self._outgoing.put(None)  # ends gRPC's thread that sends
            self._channel.close()
            self._fetcher.post(lambda engine: self._fetcher._pair_over(engine, self, problem))

    def _failed(self, handle: int, message: str) -> None:
        fetch = self._fetches.get(handle)
        if fetch is not None:
            with fetch.lock:
                fetch.arrived.clear()  # the source's word is that its pages are not to be trusted
            self._finish(fetch, message)

    def _receive(self, group: Group, coming: Coming) -> None:
        """Take part in an exchange, whoever it is for, and keep what is good."""
        count = len(coming.checksums)
        words_NW = self._staging[:count]
        nothing = words_NW[:0]
        group.all_to_all(words_NW, nothing, [0, count], [0, 0], "receiving").wait()
        fetch = self._fetches.get(coming.handle)
        if fetch is None:
            return
        found = zip(checksums(words_NW), coming.checksums, strict=True)
        good = [row for row, (is_, should) in enumerate(found) if is_ == should]
        first = coming.first_page - len(fetch.local)
        spoilt: list[int] = []
        with fetch.lock:
            if fetch.ended:
                return
            self._keep(fetch, [first + row for row in good], words_NW[good])
            fetch.cached_tokens = coming.cached_tokens
            bad = {first + row for row in range(count)} - fetch.arrived
            spoilt = sorted(bad & fetch.repeated)
            fetch.repeated |= bad
        self.silences = 0
        for index in bad.difference(spoilt):
            self._outgoing.put(
                ToSource(again=Again(handle=fetch.handle, page=len(fetch.local) + index))
            )
        if bad:
            self._fetcher.counters.add(corrupted=len(bad), repeated=len(bad) - len(spoilt))
            log.warning("%d pages of %s came damaged", len(bad), self.source)
        if spoilt:
            self._finish(fetch, f"page {spoilt[0]} came damaged twice")
        elif len(fetch.arrived) == len(fetch.pages):
            self._finish(fetch)

    def _keep(self, fetch: _Fetch, indices: list[int], words_NW: Tensor) -> None:
        self._fetcher.cache.write_pages([fetch.pages[i] for i in indices], words_NW)
        fetch.arrived.update(indices)
        fetch.heard = time.monotonic()

    def _finish(self, fetch: _Fetch, problem: str = "") -> None:
        fetcher = self._fetcher
        fetcher.post(lambda engine: fetcher._finish(engine, fetch, problem))
