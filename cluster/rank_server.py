"""One attention rank as a server: the engine's thread, and its end of the token channel.

The engine runs in a thread of its own and never waits for the network; the asyncio side never
computes. They meet in two places: an inbox of commands, and one hand-over per step. No Ray here.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc.aio

from rayseek.cluster.request import Delta, Request, RequestRefused
from rayseek.cluster.tokens_pb2 import Frame, ToRank, Update
from rayseek.cluster.tokens_pb2 import Load as LoadMessage
from rayseek.cluster.wire import METHOD, SERVICE, refusal_message, request_of, update_message

if TYPE_CHECKING:  # torch stays out of processes that only talk to a rank
    from rayseek.cluster.engine import Engine, Load

log = logging.getLogger("rayseek.rank")

Stream = int  # one connected ingress
Command: TypeAlias = "Callable[[Engine], None]"


@dataclass(frozen=True, slots=True)
class Pulse:
    """Is the engine moving? stalled_s: how long the present step has been running (0: idle)."""

    steps: int
    busy: bool
    stalled_s: float
    load: Load


class EngineLoop:
    """Runs an engine in a thread. `deliver` is called there, once per step, with its updates."""

    def __init__(
        self, engine: Engine, deliver: Callable[[dict[Stream, list[Update]]], None]
    ) -> None:
        self._engine = engine
        self._deliver = deliver
        self._inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._outbox: dict[Stream, list[Update]] = defaultdict(list)
        self._names: dict[str, tuple[Stream, int]] = {}  # engine request id -> (stream, handle)
        self._step_began: float | None = None
        self._load = engine.load
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, stream: Stream, handle: int, request: Request) -> None:
        def command(engine: Engine) -> None:
            try:
                engine.submit(request)
                self._names[request.id] = (stream, handle)
            except RequestRefused as refusal:
                self._outbox[stream].append(refusal_message(handle, refusal))
            except Exception as error:  # nothing a request contains may stop the loop
                log.exception("request %s could not be queued", request.id)
                impossible = RequestRefused(f"it cannot be run: {error!r}", retryable=False)
                self._outbox[stream].append(refusal_message(handle, impossible))

        self._inbox.put(command)

    def cancel(self, request_id: str) -> None:
        def command(engine: Engine) -> None:
            engine.cancel(request_id)
            self._names.pop(request_id, None)

        self._inbox.put(command)

    def stop(self) -> None:
        """End the thread after the present step and wait for it."""
        self._inbox.put(None)
        self._thread.join()

    @property
    def pulse(self) -> Pulse:
        began = self._step_began
        stalled = time.monotonic() - began if began is not None else 0.0
        return Pulse(self._engine.steps, began is not None, stalled, self._load)

    def _run(self) -> None:
        engine = self._engine
        while True:
            while not self._inbox.empty() or not engine.busy:
                command = self._inbox.get()
                if command is None:
                    return
                command(engine)
                if not engine.busy:
                    self._hand_over()
            self._step_began = time.monotonic()
            for delta in engine.step():
                self._post(delta)
            self._step_began = None
            self._hand_over()

    def _post(self, delta: Delta) -> None:
        name = self._names.get(delta.request_id)
        if delta.finish is not None:
            self._names.pop(delta.request_id, None)
        if name is not None:
            stream, handle = name
            self._outbox[stream].append(update_message(handle, delta))

    def _hand_over(self) -> None:
        self._load = self._engine.load
        if self._outbox:
            updates, self._outbox = self._outbox, defaultdict(list)
            self._deliver(updates)


class RankServer:
    """The gRPC end of a rank: one `Open` stream per ingress replica."""

    def __init__(self, engine: Engine) -> None:
        self._aio = asyncio.get_running_loop()
        self._streams: dict[Stream, asyncio.Queue[list[Update]]] = {}
        self._next_stream = 0
        self.engine_loop = EngineLoop(engine, self._deliver)
        self._server = grpc.aio.server()
        self._server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(
                    SERVICE,
                    {
                        METHOD: grpc.stream_stream_rpc_method_handler(
                            self._open,
                            request_deserializer=ToRank.FromString,
                            response_serializer=Frame.SerializeToString,
                        )
                    },
                ),
            )
        )

    async def start(self, host: str) -> int:
        """Listen on a free port of `host` and return it."""
        port: int = self._server.add_insecure_port(f"{host}:0")
        await self._server.start()
        return port

    async def stop(self) -> None:
        await self._server.stop(grace=None)
        self.engine_loop.stop()

    def _deliver(self, updates: dict[Stream, list[Update]]) -> None:
        """Called by the engine's thread: one wake-up of the asyncio side per step."""
        self._aio.call_soon_threadsafe(self._distribute, updates)

    def _distribute(self, updates: dict[Stream, list[Update]]) -> None:
        for stream, items in updates.items():
            if stream in self._streams:
                self._streams[stream].put_nowait(items)

    async def _open(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Frame]:
        """Serve one ingress. When its stream ends, for whatever reason, its requests end too."""
        stream = self._next_stream
        self._next_stream += 1
        outgoing = self._streams[stream] = asyncio.Queue()
        handles: set[int] = set()

        def name(handle: int) -> str:
            return f"{stream}:{handle}"

        async def read() -> None:
            async for message in requests:
                if message.HasField("submit"):
                    submit = message.submit
                    handles.add(submit.handle)
                    request = request_of(submit, name(submit.handle))
                    self.engine_loop.submit(stream, submit.handle, request)
                else:
                    handles.discard(message.cancel)
                    self.engine_loop.cancel(name(message.cancel))
            outgoing.put_nowait([])  # the ingress closed its half

        reader = asyncio.create_task(read())
        try:
            yield Frame(load=self._load_message())  # tells the ingress that the rank is there
            while items := await outgoing.get():
                handles.difference_update(u.handle for u in items if u.finish)
                yield Frame(updates=items, load=self._load_message())
        finally:
            reader.cancel()
            del self._streams[stream]
            for handle in handles:
                self.engine_loop.cancel(name(handle))

    def _load_message(self) -> LoadMessage:
        load = self.engine_loop.pulse.load
        return LoadMessage(
            running=load.running,
            waiting=load.waiting,
            pages_held=load.pages_held,
            pages_total=load.pages_total,
            prompt_tokens_queued=load.prompt_tokens_queued,
        )
