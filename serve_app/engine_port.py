"""What the HTTP side needs of an engine: to answer, and to say which model answers.

The cluster's client implements it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from rayseek.cluster.request import Delta, Request


class Engine(Protocol):
    @property
    def fingerprint(self) -> str:
        """Which model answers: its weights and its arithmetic; "" as long as that is unknown."""

    def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        """Run `request`; nothing happens before the first `__anext__`.

        The last delta carries `finish`. Raises `RequestRefused` from `__anext__`, normally before
        the first delta. Cancelling the task that awaits `__anext__`, or `aclose`, cancels the
        request. A sampled stop token may or may not be among the last delta's tokens.
        """
