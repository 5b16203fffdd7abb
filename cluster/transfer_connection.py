"""The connection between a rank that fetches pages and one source of them, as the fetcher has it.

It is made when it is first needed: a stream on which everything is said in order, and a process
group of two for the pages. A page arrives in a staging buffer, and only one with the right
checksum is copied into a page of ours, which nobody else may touch meanwhile. One that came
damaged is asked for once more.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import grpc
import torch
from torch import Tensor

from rayseek.cluster.credentials import credentials
from rayseek.cluster.group import ExchangeBroken, Group, join_store
from rayseek.cluster.precedence import give_way
from rayseek.cluster.sequence import Sequence
from rayseek.cluster.tokens_pb2 import Again, Coming, FromSource, Pair, ToSource, Want
from rayseek.cluster.transfer_counters import TransferCounters
from rayseek.cluster.transfer_source import pages_at_once
from rayseek.cluster.wire import CHANNEL_OPTIONS, FETCH, SERVICE
from rayseek.model.batch import PAGE_TOKENS
from rayseek.model.latent_cache import LatentCache, checksums

log = logging.getLogger("rayseek.transfer")


@dataclass(slots=True, eq=False)
class Fetch:
    """A request whose pages are to come from `source`.

    local: pages of its chain that were cached here; pages: taken for those that follow. Both are
    held from the moment that the fetch has begun. The lock is for what arrives.
    """

    sequence: Sequence
    source: str
    asked: float
    heard: float  # when it last heard anything, or began, or was asked for
    handle: int = 0
    connection: Connection | None = None
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


class Connection:
    """To one source. A thread of its own listens, and receives the pages.

    meeting: where the source finds us. on_done: told when a fetch has ended, and of its problem if
    it had one; on_over: when the connection has, and why. Both are called in the thread.
    """

    def __init__(
        self,
        source: str,
        meeting: Pair,
        cache: LatentCache,
        timeout_s: float,
        counters: TransferCounters,
        on_done: Callable[[Fetch, str], None],
        on_over: Callable[[Connection, str], None],
    ) -> None:
        self.source, self.silences = source, 0
        self._meeting, self._cache, self._timeout_s = meeting, cache, timeout_s
        self._counters, self._on_done, self._on_over = counters, on_done, on_over
        self._outgoing: queue.SimpleQueue[ToSource | None] = queue.SimpleQueue()
        self._outgoing.put(ToSource(pair=meeting))
        self._fetches: dict[int, Fetch] = {}
        words = cache.page_words
        self._staging = torch.empty(
            pages_at_once(words), words, dtype=torch.int32, device=cache.device
        )
        self._channel = grpc.insecure_channel(source, options=CHANNEL_OPTIONS)
        self._call = self._channel.stream_stream(
            f"/{SERVICE}/{FETCH}",
            request_serializer=ToSource.SerializeToString,
            response_deserializer=FromSource.FromString,
        )(iter(self._outgoing.get, None), metadata=credentials())
        self._thread = threading.Thread(target=self._run, name=f"fetch-{source}", daemon=True)
        self._thread.start()

    def want(self, fetch: Fetch) -> None:
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
                    trace=sequence.request.trace,
                )
            )
        )

    def leave(self, fetch: Fetch) -> None:
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
                    meeting, limit = self._meeting, self._timeout_s
                    group = Group(
                        join_store(meeting.host, meeting.port, limit), meeting.prefix, 0, 2, limit,
                        self._cache.device, address=meeting.host,
                    )  # fmt: skip
                elif kind == "coming":
                    assert group is not None, "ready comes first"
                    self._receive(group, message.coming)
                elif kind == "failed":
                    self._failed(message.failed.handle, message.failed.message)
                elif kind == "working":
                    self._works(message.working.handles)
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
            self._on_over(self, problem)

    def _failed(self, handle: int, message: str) -> None:
        fetch = self._fetches.get(handle)
        if fetch is not None:
            with fetch.lock:
                fetch.arrived.clear()  # the source's word is that its pages are not to be trusted
            self._on_done(fetch, message)

    def _works(self, handles: Iterable[int]) -> None:
        self.silences, now = 0, time.monotonic()
        for fetch in filter(None, map(self._fetches.get, handles)):
            fetch.heard = now

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
            self._counters.add(corrupted=len(bad), repeated=len(bad) - len(spoilt))
            log.warning("%d pages of %s came damaged", len(bad), self.source)
        if spoilt:
            self._on_done(fetch, f"page {spoilt[0]} came damaged twice")
        elif len(fetch.arrived) == len(fetch.pages):
            self._on_done(fetch, "")

    def _keep(self, fetch: Fetch, indices: list[int], words_NW: Tensor) -> None:
        self._cache.write_pages([fetch.pages[i] for i in indices], words_NW)
        fetch.arrived.update(indices)
        fetch.heard = time.monotonic()
