"""The rank that fetches: a request waits outside the queue until its prompt's pages have come.

Three things can go wrong, and are kept apart: a request's fetch (it alone goes on with what it
has), a page (transfer_connection.py asks for it once more), and a connection (all its fetches go
on with what they have, and the source is left alone for a while).
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable

from torch._C._distributed_c10d import TCPStore

from rayseek.cluster.config import TransferSettings
from rayseek.cluster.engine import Command, Engine
from rayseek.cluster.group import open_store
from rayseek.cluster.precedence import give_way
from rayseek.cluster.request import Request
from rayseek.cluster.tokens_pb2 import Pair
from rayseek.cluster.traces import record
from rayseek.cluster.transfer_connection import Connection, Fetch
from rayseek.cluster.transfer_counters import TransferCounters
from rayseek.model.batch import PAGE_TOKENS
from rayseek.model.latent_cache import LatentCache

log = logging.getLogger("rayseek.transfer")

REST_S = 5.0  # a source whose connection was lost or given up is not asked for so long
STARVING = 6  # times the time limit: who waits for room here for so long gets it by its age
MOST_SILENCES = 2  # fetches in a row that heard nothing in time; then the source is given up


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
        self._fetches: dict[str, Fetch] = {}  # by request id, in order of arrival
        self._connections: dict[str, Connection] = {}  # by source
        self._resting: dict[str, float] = {}  # source -> until when
        self._numbers = itertools.count(1)  # of fetches and connections
        self._closed = threading.Event()
        self._clerk: threading.Thread | None = None
        self._store: TCPStore | None = None

    def submit(self, engine: Engine, request: Request, source: str) -> None:
        """Queue a request after its pages have come, or at once if that is not worth while.

        Raises RequestRefused, as the engine does.
        """
        sequence = engine.park(request)
        cached = len(engine.pool.look_up(sequence.chain).pages)
        unknown = len(sequence.ids) - cached * PAGE_TOKENS
        if cached == len(sequence.chain) or unknown < self.settings.min_prompt_tokens:
            engine.unpark(request.id)
            return
        now = time.monotonic()
        self._fetches[request.id] = Fetch(sequence, source, now, now)
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
            if not fetch.connection and not self._begin(engine, fetch):
                return

    def close(self) -> None:
        """End every connection and thread."""
        self._closed.set()
        for connection in list(self._connections.values()):
            connection.close()
        if self._clerk is not None:
            self._clerk.join()

    # ---- in the engine's thread ----

    def _begin(self, engine: Engine, fetch: Fetch) -> bool:
        """Take the pages and ask for what belongs in them; False: there is no room yet."""
        if self._resting.get(fetch.source, 0.0) > time.monotonic():
            self._finish(engine, fetch, "the source has failed a moment ago")
            return True
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
        try:
            connection = self._connections.get(fetch.source) or self._connect(fetch.source)
        except Exception as error:  # no address, thread or memory is left for it
            self._rest(fetch.source)
            self._finish(engine, fetch, f"no connection can be made: {error!r}")
            return True
        self._connections[fetch.source] = fetch.connection = connection
        pool.hold(match.pages)
        fetch.local, fetch.pages = list(match.pages), pool.take(missing)
        fetch.handle, fetch.heard = next(self._numbers), time.monotonic()
        connection.want(fetch)
        return True

    def _rest(self, source: str) -> None:
        now = time.monotonic()
        self._resting = {other: until for other, until in self._resting.items() if until > now}
        self._resting[source] = now + REST_S

    def _connect(self, source: str) -> Connection:
        """To a source, with a group of a new name."""
        if self._store is None:
            self._store = open_store(self.host)
        meeting = Pair(
            host=self.host, port=self._store.port, prefix=f"pages-{next(self._numbers)}",
            fingerprint=self.fingerprint, page_words=self.cache.page_words,
        )  # fmt: skip

        def on_done(fetch: Fetch, problem: str) -> None:
            self.post(lambda engine: self._finish(engine, fetch, problem))

        def on_over(connection: Connection, problem: str) -> None:
            self.post(lambda engine: self._over(engine, connection, problem))

        return Connection(
            source, meeting, self.cache, self.settings.timeout_s, self.counters, on_done, on_over
        )

    def _finish(self, engine: Engine, fetch: Fetch, problem: str = "") -> None:
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
        record(
            "fetch", prompt.request.trace, fetch.asked, time.monotonic(), rayseek__pages=usable,
            rayseek__source=fetch.source, rayseek__problem=problem,
        )  # fmt: skip
        engine.unpark(fetch.key)  # a step follows, and after it others have their turn

    def _end(self, engine: Engine, fetch: Fetch) -> int:
        """Share the pages that came and let go of all; returns how many came."""
        del self._fetches[fetch.key]
        with fetch.lock:  # from now on, nobody writes to our pages
            fetch.ended = True
        if fetch.connection is None:
            return 0
        fetch.connection.leave(fetch)
        first = len(fetch.local)
        for i in range(fetch.usable):
            engine.pool.publish(fetch.pages[i], fetch.sequence.hashes[first + i])
        engine.pool.release(fetch.local + fetch.pages)
        return fetch.usable

    def _over(self, engine: Engine, connection: Connection, problem: str) -> None:
        if self._connections.get(connection.source) is connection:
            del self._connections[connection.source]
            self._rest(connection.source)
            self.counters.add(broken=1)
            log.warning("lost %s as a source of pages: %s", connection.source, problem)
        for fetch in list(self._fetches.values()):
            if fetch.connection is connection:
                self._finish(engine, fetch, problem)

    def _end_overdue(self, engine: Engine) -> None:
        for fetch in list(self._fetches.values()):
            if self._fetches.get(fetch.key) is not fetch or not self._overdue(fetch):
                continue  # since the clerk looked, it has ended, begun, or heard something
            connection = fetch.connection
            self.counters.add(timeouts=1)
            heard = "nothing was heard of it" if connection else "there was no room here"
            self._finish(engine, fetch, f"{heard} for {time.monotonic() - fetch.heard:.1f} s")
            if connection is not None:
                connection.silences += 1
                if connection.silences >= MOST_SILENCES:
                    self._over(engine, connection, f"{connection.silences} fetches heard nothing")
                    connection.close()

    # ---- in other threads ----

    def _watch(self) -> None:
        """The clerk: has fetches ended that hear nothing for too long."""
        give_way()
        while not self._closed.wait(min(0.5, self.settings.timeout_s / 10)):
            if any(map(self._overdue, list(self._fetches.values()))):
                self.post(self._end_overdue)

    def _overdue(self, fetch: Fetch) -> bool:
        """One that waits for room has asked nobody yet, and to compute its prompt where there is no
        room would cost all others. But those who need less room must not have it before this one
        for ever: in the engine's queue, nobody overtakes."""
        limit = self.settings.timeout_s * (1 if fetch.connection else STARVING)
        return time.monotonic() - fetch.heard > limit
