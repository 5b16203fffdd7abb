"""A Ray actor around one attention rank: load the model, start the engine, serve the channel."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from rayseek.cluster.config import EngineSettings
from rayseek.cluster.dispatch import RankAddress
from rayseek.cluster.precedence import take_precedence
from rayseek.cluster.rank_server import Pulse, RankServer

if TYPE_CHECKING:
    from rayseek.cluster.engine import Engine


def _load(path: Path, settings: EngineSettings) -> Engine:
    from rayseek.cluster.build import build_engine  # torch: in this process, not in the leader's

    take_precedence()  # the kernels' threads inherit it
    return build_engine(path, settings)


class Rank:
    """Actor class; plain, so that tests can run it without Ray."""

    def __init__(self, name: str, path: str, settings: EngineSettings) -> None:
        logging.basicConfig(level=logging.INFO)
        self._name = name
        self._path = Path(path)
        self._settings = settings
        self._server: RankServer | None = None

    async def start(self, host: str) -> RankAddress:
        """Load the model and listen on `host`."""
        loop = asyncio.get_running_loop()
        engine = await loop.run_in_executor(None, _load, self._path, self._settings)
        self._server = RankServer(engine)
        port = self._server.start(host)
        return RankAddress(self._name, f"{host}:{port}")

    async def pulse(self) -> Pulse:
        """Whether the engine moves; the leader asks once a second.

        Raises RuntimeError when the engine's thread has died, for which the rank is replaced.
        """
        assert self._server is not None, "pulse is asked for after start"
        if not self._server.engine_loop.alive:
            raise RuntimeError("the engine's thread has died; this rank's log says of what")
        return self._server.engine_loop.pulse

    async def run_forever(self) -> None:
        """Never returns: its failure is how the leader learns of this process's death."""
        await asyncio.Event().wait()
