"""Token channel, journal and re-dispatch over real gRPC on loopback, without Ray."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rayseek.cluster.config import EngineSettings, ExchangeSettings
from rayseek.cluster.dispatch import (
    INNOCENT_TOKENS,
    MAX_DEATHS,
    Dispatcher,
    JournalEntry,
    RankAddress,
    RankChannel,
)
from rayseek.cluster.engine import Engine, run_to_end
from rayseek.cluster.rank import Rank
from rayseek.cluster.rank_server import RankServer
from rayseek.cluster.request import (
    Delta,
    FinishReason,
    Request,
    RequestRefused,
    SamplingParams,
    Token,
)
from rayseek.cluster.scheduler import Limits
from rayseek.cluster.spec import RankSpec
from rayseek.cluster.speculation import Choice
from rayseek.cluster.tokens_pb2 import ToRank
from rayseek.cluster.wire import (
    CHANNEL_OPTIONS,
    SERVER_OPTIONS,
    delta_of,
    refusal_message,
    request_of,
    submit_message,
    update_message,
)
from tests.cluster.company import is_idle

EngineMaker = Callable[..., Engine]
ROOT = Path(__file__).parents[2]
PARAMS = SamplingParams(max_tokens=40, temperature=0.8)


def wanted(count: int, **changes: Any) -> list[Request]:
    return [
        Request(f"r{i}", tuple(range(3, 30 + i)), replace(PARAMS, seed=i, **changes))
        for i in range(count)
    ]


def undisturbed(make_engine: EngineMaker, requests: list[Request]) -> dict[str, list[Token]]:
    engine = make_engine()
    tokens: dict[str, list[Token]] = {r.id: [] for r in requests}
    for r in requests:
        engine.submit(r)
    run_to_end(engine, lambda d: tokens[d.request_id].extend(d.tokens))
    return tokens


class Cluster:
    """Ranks that come and go, and a dispatcher that discovers them."""

    def __init__(self, make_engine: EngineMaker) -> None:
        self._make_engine = make_engine
        self.servers: dict[RankAddress, RankServer] = {}
        self.dispatcher = Dispatcher(self.discover, patience_s=120, refresh_s=0.1)

    async def discover(self) -> list[RankAddress]:
        return list(self.servers)

    async def start_rank(self, pause_s: float = 0.0, **limits: Any) -> RankAddress:
        """pause_s: added to every step, so that something is left to interrupt."""
        engine = self._make_engine(**limits)
        forward = engine.model.forward

        def slowly(batch: Any) -> Any:
            time.sleep(pause_s)
            return forward(batch)

        engine.model.forward = slowly  # type: ignore[method-assign]
        server = RankServer(engine)
        port = server.start("127.0.0.1")
        address = RankAddress(f"rank-{port}", f"127.0.0.1:{port}")
        self.servers[address] = server
        return address

    async def kill_rank(self, address: RankAddress) -> None:
        await asyncio.to_thread(self.servers.pop(address).stop)

    async def running(self, address: RankAddress, requests: int = 1) -> None:
        """Wait until so many run there."""
        async with asyncio.timeout(120):
            while self.servers[address].engine_loop.pulse.load.running < requests:
                await asyncio.sleep(0.005)

    async def idle(self, address: RankAddress) -> None:
        """Wait until nothing runs there and nothing is held."""
        async with asyncio.timeout(120):
            while not await asyncio.to_thread(is_idle, self.servers[address]):
                await asyncio.sleep(0.02)

    async def tokens(self, request: Request, on_token: Callable[[], None] = lambda: None) -> Any:
        found: list[Token] = []
        finish = None
        async for delta in self.dispatcher.generate(request):
            found += delta.tokens
            finish = delta.finish
            for _ in delta.tokens:
                on_token()
        return found, finish


@pytest.fixture
async def cluster(make_engine: EngineMaker) -> AsyncIterator[Cluster]:
    made = Cluster(make_engine)
    yield made
    await made.dispatcher.close()
    for address in list(made.servers):
        await made.kill_rank(address)


async def test_tokens_arrive_unchanged(cluster: Cluster, make_engine: EngineMaker) -> None:
    requests = wanted(8, logprobs=2)
    expected = undisturbed(make_engine, requests)
    await cluster.start_rank()
    results = await asyncio.gather(*(cluster.tokens(r) for r in requests))
    for request, (tokens, finish) in zip(requests, results, strict=True):
        assert finish is FinishReason.LENGTH
        assert [t.id for t in tokens] == [t.id for t in expected[request.id]]
        for got, want in zip(tokens, expected[request.id], strict=True):
            assert got.logprob == pytest.approx(want.logprob, abs=1e-6)
            assert [i for i, _ in got.top] == [i for i, _ in want.top]


@pytest.mark.parametrize("tokens_before", [0, 1, 60, 200])
@pytest.mark.parametrize("drafts", [0, 2])
async def test_death_of_a_rank_changes_no_token(
    cluster: Cluster, make_engine: EngineMaker, tokens_before: int, drafts: int
) -> None:
    """Law 3: kill the rank after so many tokens; a successor starts a little later."""
    requests = wanted(6)
    expected = undisturbed(make_engine, requests)
    drafting = {"draft_tokens": drafts, "blur": 0.3, "policy": lambda *_: Choice(drafts)}
    first = await cluster.start_rank(pause_s=0.005, **drafting)
    seen = 0
    reached = asyncio.Event()

    def count() -> None:
        nonlocal seen
        seen += 1
        if seen >= tokens_before:
            reached.set()

    if tokens_before == 0:
        reached.set()

    async def disaster() -> None:
        await reached.wait()
        await cluster.kill_rank(first)
        await asyncio.sleep(0.2)
        await cluster.start_rank(**drafting)

    results, _ = await asyncio.gather(
        asyncio.gather(*(cluster.tokens(r, count) for r in requests)), disaster()
    )
    for request, (tokens, finish) in zip(requests, results, strict=True):
        assert finish is FinishReason.LENGTH
        assert [t.id for t in tokens] == [t.id for t in expected[request.id]]


async def test_second_rank_takes_over_at_once(cluster: Cluster, make_engine: EngineMaker) -> None:
    requests = wanted(4)
    expected = undisturbed(make_engine, requests)
    first = await cluster.start_rank(pause_s=0.02)
    runs = [asyncio.create_task(cluster.tokens(r)) for r in requests]
    await cluster.running(first, 4)
    await cluster.start_rank()
    await cluster.kill_rank(first)
    for request, run in zip(requests, runs, strict=True):
        tokens, _ = await run
        assert [t.id for t in tokens] == [t.id for t in expected[request.id]]


async def test_a_request_that_was_on_three_dying_ranks_ends_with_an_error(
    cluster: Cluster,
) -> None:
    (request,) = wanted(1, max_tokens=900)
    run = asyncio.create_task(cluster.tokens(request))
    for _ in range(MAX_DEATHS):
        address = await cluster.start_rank(pause_s=0.1)  # long before INNOCENT_TOKENS
        await cluster.running(address)
        await cluster.kill_rank(address)
    _, finish = await run
    assert finish is FinishReason.ERROR


async def test_closing_the_iterator_frees_the_rank(cluster: Cluster) -> None:
    address = await cluster.start_rank(pause_s=0.005)
    (request,) = wanted(1, max_tokens=900)
    deltas = cluster.dispatcher.generate(request)
    await anext(deltas)
    await deltas.aclose()
    await cluster.idle(address)


async def test_the_end_is_known_before_it_is_read(cluster: Cluster) -> None:
    await cluster.start_rank()
    unread: asyncio.Queue[int] = asyncio.Queue()
    request = replace(wanted(1)[0], on_end=unread.put_nowait)
    deltas = cluster.dispatcher.generate(request)
    first = await anext(deltas)
    async with asyncio.timeout(120):
        assert await unread.get() == PARAMS.max_tokens - len(first.tokens)
    (channel,) = cluster.dispatcher._alive()
    assert channel.pressure[0] == channel.load.waiting == 0
    rest = [delta async for delta in deltas]
    assert sum(len(delta.tokens) for delta in (first, *rest)) == PARAMS.max_tokens
    assert rest[-1].finish is FinishReason.LENGTH


async def test_an_ingress_that_vanishes_frees_the_rank(cluster: Cluster) -> None:
    address = await cluster.start_rank(pause_s=0.005)
    other = Dispatcher(cluster.discover)
    deltas = other.generate(wanted(1, max_tokens=900)[0])
    await anext(deltas)
    with contextlib.suppress(RequestRefused):
        await other.close()
    await cluster.idle(address)
    await deltas.aclose()


class Network:
    """A way to a rank that loses everything once it is cut, and closes no socket."""

    def __init__(self, rank: RankAddress) -> None:
        self._rank = rank
        self._pipes: list[asyncio.Task[None]] = []
        self._whole = asyncio.Event()
        self._whole.set()

    async def __aenter__(self) -> Network:
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.address = RankAddress(f"far-{port}", f"127.0.0.1:{port}")
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._pipes:
            task.cancel()
        await asyncio.gather(*self._pipes, return_exceptions=True)
        self._server.close()

    def cut(self) -> None:
        self._whole.clear()

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            while data := await reader.read(65536):
                await self._whole.wait()
                writer.write(data)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection(*self._rank.target.split(":"))
        self._pipes.append(asyncio.create_task(self._pipe(reader, there[1])))
        self._pipes.append(asyncio.create_task(self._pipe(there[0], writer)))


def quickly(options: list[tuple[str, int]]) -> list[tuple[str, int]]:
    return [(option, min(n, 300)) for option, n in options]


async def test_an_ingress_whose_host_vanishes_keeps_no_stream(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing closes its sockets: the rank has to ask whether it is there."""
    monkeypatch.setattr("rayseek.cluster.rank_server.SERVER_OPTIONS", quickly(SERVER_OPTIONS))
    rank = await cluster.start_rank()
    async with Network(rank) as network, asyncio.timeout(120):

        async def discover() -> list[RankAddress]:
            return [network.address]

        other = Dispatcher(discover)
        streams = cluster.servers[rank]._streams
        while len(streams) < 2:  # the cluster's own dispatcher has the other
            await asyncio.sleep(0.01)
        network.cut()
        while len(streams) > 1:
            await asyncio.sleep(0.01)
        await other.close()


async def test_a_stream_whose_rank_hangs_with_its_host_goes_on_elsewhere(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, make_engine: EngineMaker
) -> None:
    monkeypatch.setattr("rayseek.cluster.dispatch.CHANNEL_OPTIONS", quickly(CHANNEL_OPTIONS))
    (request,) = wanted(1, max_tokens=900)
    rank = await cluster.start_rank(pause_s=0.005)
    async with Network(rank) as network, asyncio.timeout(50):

        async def discover() -> list[RankAddress]:
            return [network.address] if network.address in reachable else [rank]

        reachable = [network.address]
        other = Dispatcher(discover, refresh_s=0.1)
        found: list[Token] = []
        async for delta in other.generate(request):
            found += delta.tokens
            if len(found) > 100 and reachable:
                reachable.clear()
                network.cut()
        await other.close()
    assert found == undisturbed(make_engine, [request])[request.id]
    assert other.moved == 1


async def test_a_submission_on_a_breaking_stream_is_not_left_behind(
    make_engine: EngineMaker,
) -> None:
    """The stream ends while a message that was already received is still being read."""
    server = RankServer(make_engine())
    ended, late = threading.Event(), threading.Event()

    class Context:
        def add_callback(self, callback: Callable[[], None]) -> None:
            self.end = callback

    def messages() -> Iterator[ToRank]:
        late.wait()
        yield ToRank(submit=submit_message(1, wanted(1, max_tokens=900)[0]))
        ended.set()

    context = Context()
    frames = server._open(messages(), context)
    next(frames)
    context.end()
    assert list(frames) == []
    late.set()
    assert await asyncio.to_thread(ended.wait, 120)
    loop = server.engine_loop
    idle = threading.Event()

    def look(engine: Engine) -> None:
        if not engine.busy and not loop._listeners:
            idle.set()

    loop._inbox.put(look)
    assert await asyncio.to_thread(idle.wait, 120)
    server.stop()


@pytest.mark.parametrize(
    "changes", [{"cache_salt": "\ud800"}, {"sampling": replace(PARAMS, top_k=2**32)}], ids=str
)
async def test_what_cannot_be_sent_leaves_nothing_behind(
    cluster: Cluster, changes: dict[str, Any]
) -> None:
    await cluster.start_rank()
    await cluster.tokens(wanted(1)[0])
    (channel,) = cluster.dispatcher._alive()
    cluster.dispatcher._source = lambda: channel  # type: ignore[method-assign]
    for _ in range(3):
        with pytest.raises(ValueError):
            await cluster.tokens(replace(wanted(1)[0], **changes))
    assert (len(channel._inboxes), channel.prefilling) == (0, 0)
    assert channel._outgoing.empty()


async def test_a_rank_that_answers_late_is_used(cluster: Cluster) -> None:
    """Its channel opens after the round of discovery that found it."""
    run = asyncio.create_task(cluster.tokens(wanted(1)[0]))
    address = await cluster.start_rank()
    server = cluster.servers.pop(address)
    channel = RankChannel(address)
    await channel.ready.wait()
    cluster.dispatcher._channels[address.name] = channel  # known before, and only now alive
    cluster.servers[address] = server
    async with asyncio.timeout(120):
        _, finish = await run
    assert finish is FinishReason.LENGTH


async def test_ranks_that_stop_give_their_requests_back(
    cluster: Cluster, make_engine: EngineMaker
) -> None:
    """More often than a request may see ranks die; nothing fails, and nothing differs."""
    requests = wanted(4, max_tokens=300)
    expected = undisturbed(make_engine, requests)
    here = await cluster.start_rank(pause_s=0.03)
    runs = [asyncio.create_task(cluster.tokens(r)) for r in requests]
    await cluster.running(here, 4)
    for more in reversed(range(MAX_DEATHS + 1)):
        server = cluster.servers.pop(here)
        here = await cluster.start_rank(pause_s=0.03 if more else 0.0)
        server.retire()
        if more:
            await cluster.running(here, 4)
        else:
            await asyncio.gather(*runs)
        await asyncio.to_thread(server.stop)
    for request, (tokens, finish) in zip(requests, await asyncio.gather(*runs), strict=True):
        assert finish is FinishReason.LENGTH
        assert [t.id for t in tokens] == [t.id for t in expected[request.id]]
    assert set(cluster.dispatcher.moved_lately(60)) == {r.id for r in requests}
    assert cluster.dispatcher.moved_lately(0) == []


@pytest.mark.parametrize("late", [True, False])
async def test_only_who_saw_ranks_die_early_is_suspected(cluster: Cluster, late: bool) -> None:
    """late: each rank dies only after tokens enough of the request."""
    (request,) = wanted(1, max_tokens=INNOCENT_TOKENS * (MAX_DEATHS + 3))
    seen = 0

    def on_token() -> None:
        nonlocal seen
        seen += 1

    pause_s = 0.005 if late else 0.1
    here = await cluster.start_rank(pause_s)
    run = asyncio.create_task(cluster.tokens(request, on_token))
    for death in range(1, MAX_DEATHS + 2):
        async with asyncio.timeout(120):
            while seen < death * INNOCENT_TOKENS and not run.done():
                await asyncio.sleep(0.001)
                channels = cluster.dispatcher._channels.values()
                if not late and any(channel._inboxes for channel in channels if channel.alive):
                    break
        await cluster.kill_rank(here)
        here = await cluster.start_rank(pause_s)
    _, finish = await run
    assert finish is (FinishReason.LENGTH if late else FinishReason.ERROR)


async def test_ranks_that_no_unit_lists_get_nothing_new(cluster: Cluster) -> None:
    """Their leader is stopping, or gone; where there is nobody else they have to do."""
    await cluster.start_rank()
    await cluster.tokens(wanted(1)[0])
    address, server = cluster.servers.popitem()
    try:
        await cluster.dispatcher._refresh()
        _, finish = await cluster.tokens(wanted(1)[0])
        assert finish is FinishReason.LENGTH, "better than nobody"
        new = await cluster.start_rank()
        await cluster.dispatcher._refresh()
        assert cluster.dispatcher._channels[address.name].alive
        assert [c.address for c in cluster.dispatcher._alive()] == [new]
    finally:
        await asyncio.to_thread(server.stop)


async def test_who_has_no_requests_there_hears_of_the_load(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ingress whose last frame told of a long queue would avoid the rank for ever."""
    monkeypatch.setattr("rayseek.cluster.rank_server.QUIET_S", 0.02)
    quiet = RankChannel(await cluster.start_rank(pause_s=0.01))
    await quiet.ready.wait()
    deltas = cluster.dispatcher.generate(wanted(1, max_tokens=900)[0])
    await anext(deltas)
    try:
        async with asyncio.timeout(120):
            while not quiet.load.running:
                await asyncio.sleep(0.01)
            await deltas.aclose()
            while quiet.load.running or quiet.load.pages_held:
                await asyncio.sleep(0.01)
    finally:
        await quiet.close()


async def test_a_silent_rank_delays_nobody(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank's host takes connections and says nothing; the other rank works."""
    monkeypatch.setattr("rayseek.cluster.dispatch.ANSWER_S", 1000.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        target = f"127.0.0.1:{silent.getsockname()[1]}"
        server = cluster.servers[await cluster.start_rank()]
        address, _ = cluster.servers.popitem()
        both = [RankAddress("silent", target), address]

        async def discover() -> list[RankAddress]:
            return both

        dispatcher = Dispatcher(discover, patience_s=120, refresh_s=0.1)
        deltas = [delta async for delta in dispatcher.generate(wanted(1)[0])]
        assert deltas[-1].finish is FinishReason.LENGTH
        await dispatcher.close()
        await asyncio.to_thread(server.stop)


async def test_who_gets_no_thread_is_refused(
    make_engine: EngineMaker, caplog: pytest.LogCaptureFixture
) -> None:
    """Else it would wait in silence, for ever."""
    server = RankServer(make_engine(), streams=2)
    address = RankAddress("rank", f"127.0.0.1:{server.start('127.0.0.1')}")
    logging.getLogger("rayseek").addHandler(caplog.handler)
    channels: list[RankChannel] = []
    for _ in range(3):
        channels.append(RankChannel(address))
        await asyncio.wait_for(channels[-1].ready.wait(), 120)
    assert [channel.alive for channel in channels] == [True, True, False]
    assert "all 2 streams are taken" in caplog.text
    await channels[0].close()
    async with asyncio.timeout(120):
        while not channels[-1].alive:
            channels.append(RankChannel(address))
            await channels[-1].ready.wait()
    for channel in channels[1:]:
        await channel.close()
    await asyncio.to_thread(server.stop)


async def test_a_dead_engine_thread_shows_in_the_pulse(tiny_path: Path) -> None:
    spec = RankSpec(
        str(tiny_path), EngineSettings(), ExchangeSettings(), alone=True,
        dedicated=False, host="127.0.0.1", node="n0",
    )  # fmt: skip
    rank = Rank("rank", spec)
    await rank.start()
    assert (await rank.pulse()).idle
    rank._server.engine_loop.stop()  # as a defect would end it
    with pytest.raises(RuntimeError, match="has died"):
        await rank.pulse()
    rank._server._server.stop(grace=None).wait()


async def test_refusals_say_why(cluster: Cluster) -> None:
    await cluster.start_rank(context=256, max_queue=1, step=Limits(1, 64, 64), pause_s=0.005)
    with pytest.raises(RequestRefused, match="exceed the context of 256") as refused:
        await cluster.tokens(replace(wanted(1)[0], prompt_ids=tuple([5] * 250)))
    assert not refused.value.retryable
    runs = [asyncio.create_task(cluster.tokens(r)) for r in wanted(6)]
    outcomes = await asyncio.gather(*runs, return_exceptions=True)
    refusals = [o for o in outcomes if isinstance(o, RequestRefused)]
    assert refusals and all("max_queue" in r.reason and r.retryable for r in refusals)
    assert any(not isinstance(o, BaseException) for o in outcomes)


async def test_a_full_queue_delays_a_continuation_but_does_not_end_it(
    cluster: Cluster, make_engine: EngineMaker
) -> None:
    """Six streams on a rank that dies; its successor runs one at a time and queues one."""
    requests = wanted(6)
    expected = undisturbed(make_engine, requests)
    first = await cluster.start_rank(pause_s=0.02)
    runs = [asyncio.create_task(cluster.tokens(r)) for r in requests]
    await cluster.running(first, 6)
    await cluster.kill_rank(first)
    await cluster.start_rank(max_queue=1, step=Limits(1, 64, 64))
    for request, (tokens, _) in zip(requests, await asyncio.gather(*runs), strict=True):
        assert [t.id for t in tokens] == [t.id for t in expected[request.id]]


async def test_no_rank_at_all_is_said_after_patience(make_engine: EngineMaker) -> None:
    cluster = Cluster(make_engine)
    await cluster.dispatcher.close()
    cluster.dispatcher = Dispatcher(cluster.discover, patience_s=0.3, refresh_s=0.1)
    with pytest.raises(RequestRefused, match="no rank is up"):
        await cluster.tokens(wanted(1)[0])
    await cluster.dispatcher.close()


async def test_a_request_that_has_begun_has_more_patience(
    cluster: Cluster, make_engine: EngineMaker
) -> None:
    (request,) = wanted(1)
    expected = undisturbed(make_engine, [request])
    await cluster.dispatcher.close()
    cluster.dispatcher = Dispatcher(cluster.discover, patience_s=0.3, refresh_s=0.1)
    first = await cluster.start_rank(pause_s=0.005)
    begun = asyncio.Event()
    run = asyncio.create_task(cluster.tokens(request, begun.set))
    await begun.wait()
    await cluster.kill_rank(first)
    await asyncio.sleep(1.0)
    with pytest.raises(RequestRefused, match="no rank is up"):
        await cluster.tokens(replace(request, id="new"))
    await cluster.start_rank()
    tokens, _ = await run
    assert [t.id for t in tokens] == [t.id for t in expected[request.id]]


def test_journal_keeps_what_was_delivered_and_the_first_cache_count() -> None:
    request = wanted(1)[0]
    entry = JournalEntry(request)
    entry.record(Delta(request.id, (Token(7), Token(8)), cached_tokens=64))
    delta = entry.record(Delta(request.id, (Token(9),), cached_tokens=0))
    assert delta.cached_tokens == 64
    assert entry.continuation().emitted_ids == (7, 8, 9)


def test_messages_survive_the_wire() -> None:
    params = SamplingParams(
        max_tokens=7, temperature=0.3, top_k=4, top_p=0.9, min_p=0.1, frequency_penalty=-1.0,
        presence_penalty=2.0, repetition_penalty=1.1, logit_bias=((3, -100.0), (9, 0.5)),
        seed=2**64 - 1, stop_token_ids=(1, 2), min_tokens=2, logprobs=0, banned_ids=(128806, 2),
    )  # fmt: skip
    request = Request("id", (0, 5, 129279), params, "salt", -3, (4,))
    assert request_of(submit_message(1, request), "id") == request
    plain = replace(request, sampling=replace(params, logprobs=None))
    assert request_of(submit_message(1, plain), "id") == plain
    deltas = [
        Delta("id", (Token(1), Token(2)), None, 0),
        Delta("id", (Token(1, drafted=True), Token(2, rejected=2), Token(3)), FinishReason.LENGTH),
        Delta("id", (Token(1, -0.5, ((1, -0.5),), drafted=True), Token(2, -1.5, ((3, -0.5),)))),
        Delta("id", (Token(1, -0.5, ((1, -0.5), (2, -1.5))),), FinishReason.STOP, 64),
        Delta("id", (), FinishReason.ERROR, None, "why"),
    ]
    for delta in deltas:
        assert delta_of(update_message(1, delta), "id") == delta
    with pytest.raises(RequestRefused, match="full"):
        delta_of(refusal_message(1, RequestRefused("full")), "id")


def test_generated_code_is_fresh(tmp_path: Path) -> None:
    """`tokens_pb2.py` describes what `tokens.proto` says; otherwise run `make proto`."""
    source = ROOT / "cluster"
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", f"-I{source}", f"--python_out={tmp_path}",
         "tokens.proto"],
        check=True,
    )  # fmt: skip

    def description(file: Path) -> list[str]:
        return [line for line in file.read_text().splitlines() if "AddSerializedFile" in line]

    assert description(source / "tokens_pb2.py") == description(tmp_path / "tokens_pb2.py") != []
