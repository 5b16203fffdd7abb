"""Handing a prompt's pages over from one rank to another: both ends of it, as a rank has them.

Transferred pages are prefix-cache pages: the rank that decodes takes pages of its own, fetches
what belongs in them, and publishes them under their hash chain. Then the request is queued like
any other and finds its prompt cached but for the last piece. So whatever becomes of a transfer
can cost time, and never change a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from rayseek.cluster.config import TransferSettings
from rayseek.cluster.engine import Command, Engine
from rayseek.cluster.request import Delta, Request
from rayseek.cluster.tokens_pb2 import FromSource
from rayseek.cluster.transfer_counters import TransferCounters
from rayseek.cluster.transfer_fetch import PageFetcher
from rayseek.cluster.transfer_source import PageSource


class PageTransfers:
    """What an engine's loop needs of transfers; its methods are for the engine's thread.

    post: runs a command in the engine's thread.
    """

    def __init__(
        self, engine: Engine, settings: TransferSettings, post: Callable[[Command], None]
    ) -> None:
        self.counters = TransferCounters()
        cache, fingerprint = engine.model.cache, engine.fingerprint
        self.source = PageSource(cache, fingerprint, post, settings.timeout_s, self.counters)
        self.fetcher = PageFetcher(cache, fingerprint, settings, post, self.counters)
        self._served = False

    def listen_on(self, host: str) -> None:
        """Where other ranks reach this one; to be called before anything is asked for."""
        self.fetcher.host = self.source.host = host

    def submit(self, engine: Engine, request: Request, source: str) -> None:
        """Queue a request; if `source` names a rank, after its pages came from there."""
        if source:
            self.fetcher.submit(engine, request, source)
        else:
            engine.submit(request)

    def cancel(self, engine: Engine, request_id: str) -> None:
        """Forget a request wherever it is."""
        self.fetcher.cancel(engine, request_id)
        engine.cancel(request_id)
        self.fetcher.begin_waiting(engine)

    def after_step(self, engine: Engine, deltas: list[Delta]) -> None:
        """To be called between any two steps: pages became final, or free."""
        self.source.after_step(engine, deltas)
        self.fetcher.begin_waiting(engine)

    def serve(self, requests: Iterator[Any], context: Any) -> Iterator[FromSource]:
        """gRPC's `Fetch`."""
        return self.source.serve(requests, context)

    def take_served(self) -> bool:
        """Whether this rank has prefilled for others since the last call."""
        served, self._served = self._served or self.source.active, self.source.active
        return served

    def close(self) -> None:
        """End the threads of our own; streams of others end with the server."""
        self.fetcher.close()
