"""Copies of experts from process to process: who has which, the server that gives, who asks.

A holder that a plan gives experts asks those who had them under the plan before; what nobody gives,
or what comes damaged, is read from the checkpoint. Copies travel on a channel of their own, in
threads that no step waits for. No torch here.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import grpc

from rayseek.cluster.credentials import Gate, credentials
from rayseek.cluster.placement import ExpertPlacement
from rayseek.cluster.tokens_pb2 import Copied, CopyOf
from rayseek.cluster.wire import COPY, SERVICE

if TYPE_CHECKING:
    from rayseek.model.expert_slots import ExpertCopy

log = logging.getLogger("rayseek.copies")

LIMIT_S = 3.0  # for one copy; an expert of V3 has 44 MB, and comes in one message
PATIENCE_S = 2 * LIMIT_S  # gRPC has been seen to forget a call, its time limit included
ANY_SIZE = (("grpc.max_receive_message_length", -1),)
ASKED = 2  # peers, before the checkpoint is read
GIVING = 4  # copies that a process gives at once


@dataclass(frozen=True, slots=True)
class Sources:
    """Who had the experts before: `addresses` (host:port) of the holders of `placement`; "" where
    a process is gone."""

    placement: ExpertPlacement
    addresses: tuple[str, ...]

    def of(self, layer: int, expert: int) -> list[str]:
        """Who can be asked for an expert."""
        holders = (
            self.placement.holder_of(slot)
            for slot, here in enumerate(self.placement.slots.get(layer, ()))
            if here == expert
        )
        return [self.addresses[holder] for holder in holders if self.addresses[holder]]


@dataclass(frozen=True, slots=True)
class Taken:
    """Experts that a process took in since its start: copied from others, or read from the
    checkpoint. refused: copies that came damaged, in whose place the checkpoint was read."""

    copied: int = 0
    copied_bytes: int = 0
    read: int = 0
    read_bytes: int = 0
    refused: int = 0


class CopyServer:
    """Gives copies of what this process has loaded. give: called in the server's threads; KeyError
    for what is not here."""

    def __init__(self, give: Callable[[int, int], ExpertCopy]) -> None:
        self._give = give
        self._pool = ThreadPoolExecutor(GIVING, "copies")
        self._server = grpc.server(self._pool, interceptors=[Gate()])
        copy = grpc.unary_unary_rpc_method_handler(
            self._copy,
            request_deserializer=CopyOf.FromString,
            response_serializer=Copied.SerializeToString,
        )
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, {COPY: copy}),)
        )

    def start(self, host: str) -> int:
        """Listen on a free port of `host` and return it."""
        port: int = self._server.add_insecure_port(f"{host}:0")
        self._server.start()
        return port

    def stop(self) -> None:
        self._server.stop(grace=None).wait()
        self._pool.shutdown(wait=False)

    def _copy(self, wanted: CopyOf, context: Any) -> Copied:
        try:
            copy = self._give(wanted.layer, wanted.expert)
        except KeyError:
            context.abort(grpc.StatusCode.NOT_FOUND, "it is not loaded here")
        except OSError as error:
            context.abort(grpc.StatusCode.UNAVAILABLE, f"it cannot be read here: {error}")
        return Copied(digest=copy.digest, data=copy.data)


class Asking:
    """Asks the sources of one load, if there are any, as a context: its connections end with it.

    first: which of several is asked first, so that not all ask the same.
    """

    def __init__(self, sources: Sources | None, first: int) -> None:
        self._sources, self._first = sources, first
        self._channels: dict[str, grpc.Channel] = {}
        self._opening = threading.Lock()
        self._useless: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for channel in self._channels.values():
            channel.close()

    def fetch(self, layer: int, expert: int) -> ExpertCopy | None:
        """A copy, not yet checked; None if nobody gives one. May run in several threads."""
        those = self._sources.of(layer, expert) if self._sources else []
        turn = self._first % len(those) if those else 0
        for source in (those[turn:] + those[:turn])[:ASKED]:
            if source not in self._useless:
                try:
                    return self._copy(source, layer, expert)
                except (grpc.RpcError, grpc.FutureTimeoutError) as error:
                    code, why = None, "no answer"
                    if isinstance(error, grpc.RpcError):
                        code, why = error.code(), error.details()
                    if code is not grpc.StatusCode.NOT_FOUND:
                        self._useless.add(source)  # for this load; waiting for it is dear
                    log.warning(
                        "no copy of expert %d of layer %d from %s: %s", expert, layer, source, why
                    )
        return None

    def _copy(self, source: str, layer: int, expert: int) -> ExpertCopy:
        from rayseek.model.expert_slots import ExpertCopy

        with self._opening:
            if source not in self._channels:
                self._channels[source] = grpc.insecure_channel(source, ANY_SIZE)
            channel = self._channels[source]
        call = channel.unary_unary(
            f"/{SERVICE}/{COPY}",
            request_serializer=CopyOf.SerializeToString,
            response_deserializer=Copied.FromString,
        ).future(CopyOf(layer=layer, expert=expert), metadata=credentials(), timeout=LIMIT_S)
        try:
            copied = call.result(PATIENCE_S)
        except grpc.FutureTimeoutError:
            with self._opening:
                self._channels.pop(source, None)  # closing it would wait for the call
            raise
        return ExpertCopy(copied.data, copied.digest)
