"""One attention rank as a server: the engine's thread, and its end of the token channel.

The engine runs in a thread of its own and never waits for the network; what serves the network
never computes. They meet in two places: an inbox of commands, and one hand-over per step.

gRPC's threaded server and not its asyncio one: an event loop in this process fights the engine for
the interpreter lock, which was measured to add 1.2 ms to every step (threads: 0.1 ms). No Ray here.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc

from rayseek.cluster.agreement import Closed
from rayseek.cluster.config import TransferSettings
from rayseek.cluster.credentials import Gate
from rayseek.cluster.plan import Pulse
from rayseek.cluster.precedence import take_precedence
from rayseek.cluster.request import Delta, FinishReason, Request, RequestRefused, Token
from rayseek.cluster.tokens_pb2 import Frame, FromSource, ToRank, ToSource, Update
from rayseek.cluster.tokens_pb2 import Load as LoadMessage
from rayseek.cluster.traces import record
from rayseek.cluster.wire import (
    FETCH,
    METHOD,
    SERVER_OPTIONS,
    SERVICE,
    draft_codes,
    refusal_message,
    request_of,
    update_message,
)

if TYPE_CHECKING:  # torch stays out of processes that only talk to a rank
    from rayseek.cluster.engine import Command, Engine
    from rayseek.cluster.participant import Participant

log = logging.getLogger("rayseek.rank")

LOOK_S = 1.0  # a step that could do nothing is tried again after this, should nobody tell why
QUIET_S = 1.0  # without news, a stream hears of a load that has changed

Stream = int  # one connected ingress
Serve: TypeAlias = Callable[[Iterator[Any], Any], Iterator[Any]]


@dataclass(slots=True)
class Outbox:
    """What a step brought one stream: plain tokens, and everything else."""

    handles: list[int] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)


@dataclass(slots=True)
class Listener:
    """Who gets the deltas of a request; `told`: knows how many of its tokens were cached."""

    stream: Stream
    handle: int
    told: bool = False
    trace: str = ""  # of the request, and since when it is here
    began: float = field(default_factory=time.monotonic)
    first: float | None = None  # when its first token was made

    def ended(self, delta: Delta | None = None) -> None:
        """Tell its trace what it waited for here. delta: the last; None: it is not wanted more."""
        if self.trace:
            now = time.monotonic()
            record("prefill", self.trace, self.began, self.first or now)
            if self.first:
                finish = delta.finish if delta and delta.finish else FinishReason.CANCELLED
                record("decode", self.trace, self.first, now, rayseek__finish=finish.value)


Deliver: TypeAlias = Callable[[dict[Stream, Outbox], bool], None]


class EngineLoop:
    """Runs an engine in a thread; `deliver` is called there, once per step that brought news.

    Its second argument: whether streams without news should hear of the load as well.
    """

    def __init__(
        self,
        engine: Engine,
        deliver: Deliver,
        participant: Participant | None = None,
        transfer: TransferSettings | None = None,
    ) -> None:
        """participant: this rank's part in its unit; None: it is alone."""
        from rayseek.cluster.transfer import PageTransfers

        self._engine, self.fingerprint = engine, engine.fingerprint
        self._deliver = deliver
        self._participant = participant
        self._inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._outboxes: dict[Stream, Outbox] = defaultdict(Outbox)
        self._listeners: dict[str, Listener] = {}  # by the engine's request id
        self._step_began: float | None = None
        self.load = engine.load  # after its last step
        self.transfers = PageTransfers(engine, transfer or TransferSettings(), self._put)
        engine.wake_by(lambda: self._put(_nothing))
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, stream: Stream, handle: int, request: Request, source: str = "") -> None:
        """source: host:port of a rank that may prefill it."""

        listener = Listener(stream, handle, trace=request.trace)

        def command(engine: Engine) -> None:
            try:
                self.transfers.submit(engine, request, source)
                self._listeners[request.id] = listener
            except RequestRefused as refusal:
                self._outboxes[stream].updates.append(refusal_message(handle, refusal))
            except Exception as error:  # nothing a request contains may stop the loop
                log.exception("request %s could not be queued", request.id)
                impossible = RequestRefused(f"it cannot be run: {error!r}", retryable=False)
                self._outboxes[stream].updates.append(refusal_message(handle, impossible))

        self._put(command)

    def cancel(self, request_id: str) -> None:
        def command(engine: Engine) -> None:
            self.transfers.cancel(engine, request_id)
            if listener := self._listeners.pop(request_id, None):
                listener.ended()

        self._put(command)

    def stop(self) -> None:
        """End the thread after the present step and wait for it."""
        self._put(None)
        if self._participant is not None:
            self._participant.close()
        self._thread.join()
        self.transfers.close()

    def _put(self, command: Command | None) -> None:
        self._inbox.put(command)
        if self._participant is not None:
            self._participant.ring()

    @property
    def alive(self) -> bool:
        """Whether the thread runs; only a defect of the engine ends it without `stop`."""
        return self._thread.is_alive()

    @property
    def pulse(self) -> Pulse:
        began = self._step_began
        if self._participant is not None:
            return replace(self._participant.pulse, load=self.load, work=self._engine.work)
        since = time.monotonic() - began if began is not None else 0.0
        steps, idle = self._engine.steps, began is None
        return Pulse(
            0, steps, f"step {steps}", waits=False, idle=idle, since_s=since, load=self.load,
            work=self._engine.work,
        )  # fmt: skip

    def _run(self) -> None:
        take_precedence()
        try:
            self._work()
        except Closed:
            pass
        finally:
            if self._participant is not None:
                self._participant.leave()

    def _work(self) -> None:
        engine, participant = self._engine, self._participant
        while True:
            while not self._inbox.empty() or not (engine.busy or participant):
                if not self._obey(self._inbox.get()):
                    return
            if not engine.busy and participant:
                participant.idle(lambda: not self._inbox.empty())
                continue
            before, self._step_began = engine.progress, time.monotonic()
            deltas = engine.step()
            for delta in deltas:
                self._post(delta)
            self.transfers.after_step(engine, deltas)
            self._step_began = None
            self._hand_over()
            if engine.progress == before and not deltas and not self._await_news():
                return

    def _await_news(self) -> bool:
        """Requests are there, and nothing can be done for them: they wait for a grammar, or for
        pages that transfers hold, and a command will tell. Whether to go on."""
        if self._participant is not None:
            look = time.monotonic() + LOOK_S
            self._participant.idle(lambda: not self._inbox.empty() or time.monotonic() > look)
            return True
        try:
            return self._obey(self._inbox.get(timeout=LOOK_S))
        except queue.Empty:
            return True

    def _obey(self, command: Command | None) -> bool:
        """Whether to go on."""
        if command is None:
            return False
        command(self._engine)
        if not self._engine.busy:
            self._hand_over()
        return True

    def _post(self, delta: Delta) -> None:
        listener = self._listeners.get(delta.request_id)
        if listener is None:
            return
        outbox = self._outboxes[listener.stream]
        if listener.told and delta.finish is None and delta.tokens[0].logprob is None:
            outbox.handles += [listener.handle] * len(delta.tokens)
            outbox.tokens += delta.tokens
            return
        outbox.updates.append(update_message(listener.handle, delta))
        listener.told = True
        if listener.first is None:
            listener.first = time.monotonic()
        if delta.finish is not None:
            del self._listeners[delta.request_id]
            listener.ended(delta)

    def _hand_over(self) -> None:
        self.load = self._engine.load
        served = self.transfers.take_served()
        if self._outboxes or served:
            outboxes, self._outboxes = self._outboxes, defaultdict(Outbox)
            self._deliver(outboxes, served)


def _nothing(_: Engine) -> None:
    """The command to look again."""


class RankServer:
    """The gRPC end of a rank: an `Open` stream per ingress replica, a `Fetch` per other rank."""

    def __init__(
        self,
        engine: Engine,
        participant: Participant | None = None,
        transfer: TransferSettings | None = None,
        streams: int = 64,
    ) -> None:
        """streams: at once, of ingresses and other ranks; each has a thread that mostly sleeps."""
        self._most, self._served, self._serving = streams, 0, threading.Lock()
        self._streams: dict[Stream, queue.SimpleQueue[Outbox | None]] = {}
        self._retired = False
        self._stream_numbers = itertools.count()  # `next` is atomic: streams open in threads
        self.engine_loop = EngineLoop(engine, self._deliver, participant, transfer)
        self._pool = ThreadPoolExecutor(streams, "token-channel")
        self._server = grpc.server(
            self._pool, interceptors=[Gate()], options=SERVER_OPTIONS,
            maximum_concurrent_rpcs=streams,  # others would wait for a thread, and nobody know
        )  # fmt: skip
        self._server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(
                    SERVICE,
                    {
                        METHOD: grpc.stream_stream_rpc_method_handler(
                            self._counted(self._open),
                            request_deserializer=ToRank.FromString,
                            response_serializer=Frame.SerializeToString,
                        ),
                        FETCH: grpc.stream_stream_rpc_method_handler(
                            self._counted(self.engine_loop.transfers.serve),
                            request_deserializer=ToSource.FromString,
                            response_serializer=FromSource.SerializeToString,
                        ),
                    },
                ),
            )
        )

    def start(self, host: str) -> int:
        """Listen on a free port of `host` and return it."""
        self.engine_loop.transfers.listen_on(host)
        port: int = self._server.add_insecure_port(f"{host}:0")
        self._server.start()
        return port

    def retire(self) -> None:
        """End every stream as one that is over, and new ones at once: the ingresses continue
        their requests elsewhere, and no request counts it as a death."""
        self._retired = True
        for outgoing in list(self._streams.values()):
            outgoing.put(None)

    def stop(self) -> None:
        """End every stream and the engine's thread."""
        self._server.stop(grace=None).wait()
        self._pool.shutdown(wait=False)
        self.engine_loop.stop()

    def _counted(self, serve: Serve) -> Serve:
        def counted(requests: Iterator[Any], context: Any) -> Iterator[Any]:
            with self._serving:
                self._served += 1
                if self._served == self._most:
                    log.error("all %d streams are taken: whoever comes now is refused", self._most)
            try:
                yield from serve(requests, context)
            finally:
                with self._serving:
                    self._served -= 1

        return counted

    def _deliver(self, outboxes: dict[Stream, Outbox], to_all: bool) -> None:
        for stream in list(self._streams) if to_all else outboxes:
            outgoing = self._streams.get(stream)
            if outgoing is not None:
                outgoing.put(outboxes.get(stream) or Outbox())

    def _open(self, requests: Iterator[Any], context: Any) -> Iterator[Frame]:
        """Serve one ingress. When its stream ends, for whatever reason, its requests end too."""
        stream = next(self._stream_numbers)
        outgoing = self._streams[stream] = queue.SimpleQueue()
        if self._retired:
            outgoing.put(None)
        handles: set[int] = set()

        def name(handle: int) -> str:
            return f"{stream}:{handle}"

        def read() -> None:
            try:
                for message in requests:
                    if message.HasField("submit"):
                        submit = message.submit
                        handles.add(submit.handle)
                        request = request_of(submit, name(submit.handle))
                        self.engine_loop.submit(stream, submit.handle, request, submit.source)
                    else:
                        handles.discard(message.cancel)
                        self.engine_loop.cancel(name(message.cancel))
            except grpc.RpcError:
                pass  # the ingress is gone, or this server stops
            finally:  # here and not below: from now on, nothing of this stream is submitted
                for handle in list(handles):
                    self.engine_loop.cancel(name(handle))
                outgoing.put(None)

        context.add_callback(lambda: outgoing.put(None))
        threading.Thread(target=read, name=f"stream-{stream}", daemon=True).start()
        try:
            # Tells the ingress that the rank is there, and with which model.
            told = self._load_message()
            if not self._retired:
                yield Frame(load=told, fingerprint=self.engine_loop.fingerprint)
            while True:
                try:
                    outbox = outgoing.get(timeout=QUIET_S)
                except queue.Empty:
                    if self._load_message() == told:
                        continue
                    outbox = Outbox()
                if outbox is None:
                    break
                handles.difference_update(u.handle for u in outbox.updates if u.finish)
                told = self._load_message()
                yield Frame(
                    updates=outbox.updates,
                    handles=outbox.handles,
                    ids=[token.id for token in outbox.tokens],
                    drafts=draft_codes(outbox.tokens),
                    load=told,
                )
        finally:
            del self._streams[stream]

    def _load_message(self) -> LoadMessage:
        load = self.engine_loop.load
        return LoadMessage(
            running=load.running,
            waiting=load.waiting,
            pages_held=load.pages_held,
            pages_total=load.pages_total,
            prompt_tokens_queued=load.prompt_tokens_queued,
        )
