"""What a rank counts of the pages it handed over and fetched. Plain data, no torch."""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Transfers:
    """Since the rank's start.

    fetched: requests whose pages came; pages, bytes: that were of use; seconds: from asking for
    a request's pages to having them, summed. corrupted: pages that came with a wrong checksum;
    repeated: pages asked for again. partly: requests that got only the first of their pages;
    fallbacks: requests that got none, and were computed here. timeouts: requests of these two
    that heard nothing for too long, or had no room. broken: connections to a source that were lost
    or given up. sent: pages sent to others.
    """

    fetched: int = 0
    pages: int = 0
    bytes: int = 0
    seconds: float = 0.0
    corrupted: int = 0
    repeated: int = 0
    partly: int = 0
    fallbacks: int = 0
    timeouts: int = 0
    broken: int = 0
    sent: int = 0


class TransferCounters:
    """`Transfers` in the making; any thread may add."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, float] = asdict(Transfers())

    def add(self, **amounts: float) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self._counts[name] += amount

    @property
    def so_far(self) -> Transfers:
        with self._lock:
            return Transfers(**self._counts)  # type: ignore[arg-type]
