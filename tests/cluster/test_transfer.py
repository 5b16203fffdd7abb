"""Pages handed over between engines: the bytes, their checksums, and the same tokens as ever."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayseek.cluster.config import TransferSettings
from rayseek.cluster.dispatch import Dispatcher, RankAddress
from rayseek.cluster.engine import Engine, run_to_end
from rayseek.cluster.group import Group
from rayseek.cluster.rank_server import RankServer
from rayseek.cluster.request import Delta, FinishReason, Request, RequestRefused, SamplingParams
from rayseek.cluster.scheduler import Limits
from rayseek.cluster.speculation import Choice
from rayseek.cluster.transfer_counters import Transfers
from rayseek.cluster.transfer_source import PageSource
from rayseek.model.batch import PAGE_TOKENS
from rayseek.model.latent_cache import checksums
from tests.cluster.company import in_engine, is_idle

EngineMaker = Callable[..., Engine]
FEW = settings(max_examples=15)
PARAMS = SamplingParams(max_tokens=12, temperature=0.8, seed=3)
PROMPT_ONLY = SamplingParams(max_tokens=0)


def prompt_of(seed: int, length: int) -> tuple[int, ...]:
    random = Random(seed)
    return tuple(random.randrange(3, 300) for _ in range(length))


def collect(engine: Engine) -> list[Delta]:
    found: list[Delta] = []
    run_to_end(engine, found.append)
    return found


@FEW
@given(st.integers(2, 400), st.integers(0, 5), st.sampled_from([0, 2]))
def test_a_request_without_tokens_fills_the_prefix_cache(
    make_engine: EngineMaker, length: int, cached: int, drafts: int
) -> None:
    """max_tokens 0: every full page before the last token, nothing sampled, nothing held."""
    engine = make_engine(draft_tokens=drafts, policy=lambda *_: Choice(drafts))
    ids = prompt_of(1, length)
    if cached:
        engine.submit(Request("before", ids[: min(cached * 64 + 1, length)], PROMPT_ONLY))
        collect(engine)
    engine.submit(Request("r", ids, PROMPT_ONLY))
    (delta,) = collect(engine)
    assert delta.finish is FinishReason.LENGTH and not delta.tokens
    assert delta.cached_tokens == min(cached, (length - 1) // 64) * 64
    assert engine.load.pages_held == 0
    engine.pool.check()
    engine.submit(Request("after", ids, PARAMS))
    assert collect(engine)[0].cached_tokens == (length - 1) // 64 * 64


def copy_prefix(source: Engine, target: Engine, request: Request) -> None:
    """What a hand-over does, in one go."""
    sequence = target.park(request)
    match = source.pool.look_up(sequence.chain)
    assert len(match.pages) == len(sequence.chain)
    pages = target.pool.take(len(match.pages))
    target.model.cache.write_pages(pages, source.model.cache.read_pages(match.pages))
    for page, address in zip(pages, sequence.chain, strict=True):
        target.pool.publish(page, address)
    target.pool.release(pages)
    target.unpark(request.id)


@FEW
@given(st.integers(65, 400), st.sampled_from([0, 2]), st.floats(0, 1.5))
def test_copied_pages_give_the_same_tokens(
    make_engine: EngineMaker, length: int, drafts: int, temperature: float
) -> None:
    def engine() -> Engine:
        return make_engine(draft_tokens=drafts, policy=lambda *_: Choice(drafts))

    sampling = replace(PARAMS, temperature=temperature, logprobs=1)
    request = Request("r", prompt_of(length, length), sampling)
    alone, source, target = engine(), engine(), engine()
    alone.submit(request)
    expected = [(t.id, t.logprob) for delta in collect(alone) for t in delta.tokens]
    source.submit(replace(request, sampling=PROMPT_ONLY))
    collect(source)
    copy_prefix(source, target, request)
    deltas = collect(target)
    assert [(t.id, t.logprob) for delta in deltas for t in delta.tokens] == expected
    assert deltas[0].cached_tokens == (length - 1) // PAGE_TOKENS * PAGE_TOKENS


def test_a_parked_request_counts_and_can_be_cancelled(make_engine: EngineMaker) -> None:
    engine = make_engine(max_queue=1)
    engine.park(Request("r", prompt_of(1, 70), PARAMS))
    assert not engine.busy and engine.load.waiting == 1
    with pytest.raises(RequestRefused, match="queued already"):
        engine.submit(Request("s", prompt_of(1, 70), PARAMS))
    engine.cancel("r")
    assert engine.load.waiting == 0
    with pytest.raises(RequestRefused, match="no grammars"):
        engine._grammars = None
        engine.park(Request("g", prompt_of(1, 70), PARAMS, grammar="start: /a/"))


@FEW
@given(st.integers(0, 2**31), st.integers(0, 31), st.data())
def test_a_flipped_bit_changes_the_checksum(seed: int, bit: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, (3, 50), generator=generator).int()
    before = checksums(words)
    assert checksums(words[1:2]) == before[1:2]
    row, column = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 49))
    flip = 1 << bit if bit < 31 else -(2**31)
    words[row, column] ^= flip
    after = checksums(words)
    assert [a == b for a, b in zip(before, after, strict=True)] == [r != row for r in range(3)]


class Split:
    """Ranks that decode and ranks that prefill, over real gRPC and gloo, and their dispatcher."""

    def __init__(self, make_engine: EngineMaker, timeout_s: float = 60.0) -> None:
        self._make_engine = make_engine
        self._settings = TransferSettings(min_prompt_tokens=64, timeout_s=timeout_s)
        self.servers: dict[RankAddress, RankServer] = {}
        self.dispatcher = Dispatcher(self.discover, patience_s=120, refresh_s=0.1)

    async def discover(self) -> list[RankAddress]:
        return list(self.servers)

    async def start(self, prefills: bool, pause_s: float = 0.0, **limits: Any) -> RankServer:
        """pause_s: added to every step, so that something is left to interrupt."""
        engine = self._make_engine(**limits)
        forward = engine.model.forward

        def slowly(batch: Any) -> Any:
            time.sleep(pause_s)
            return forward(batch)

        engine.model.forward = slowly  # type: ignore[method-assign]
        server = RankServer(engine, transfer=self._settings)
        port = server.start("127.0.0.1")
        address = RankAddress(f"rank-{port}", f"127.0.0.1:{port}", prefills)
        self.servers[address] = server
        while len(self.dispatcher._alive(prefills)) < sum(
            a.prefills == prefills for a in self.servers
        ):
            await asyncio.sleep(0.01)
        return server

    async def stop(self, server: RankServer) -> None:
        for address in [a for a, s in self.servers.items() if s is server]:
            del self.servers[address]
        await asyncio.to_thread(server.stop)

    async def run(self, request: Request) -> tuple[list[tuple[int, Any]], int | None]:
        tokens: list[tuple[int, Any]] = []
        cached = None
        async for delta in self.dispatcher.generate(request):
            tokens += [(t.id, t.logprob) for t in delta.tokens]
            cached = delta.cached_tokens if cached is None else cached
            assert delta.finish is not FinishReason.ERROR, delta.error
        return tokens, cached

    async def idle(self) -> None:
        """Wait until nothing is held anywhere; what then still is, has leaked."""
        for server in self.servers.values():
            async with asyncio.timeout(120):
                while not await asyncio.to_thread(is_idle, server):
                    await asyncio.sleep(0.02)


def counted(server: RankServer) -> Transfers:
    return server.engine_loop.transfers.counters.so_far


@pytest.fixture
async def split(make_engine: EngineMaker) -> AsyncIterator[Split]:
    made = Split(make_engine)
    yield made
    await close(made)


async def close(split: Split) -> None:
    await split.dispatcher.close()
    for server in list(split.servers.values()):
        await split.stop(server)


def wanted(count: int, seed: int = 0, max_tokens: int = 12) -> list[Request]:
    """Prompts of one to six pages, many of which begin alike."""
    random = Random(seed)
    made = []
    for i in range(count):
        shared = prompt_of(random.randrange(3), random.choice([0, 64, 128, 200, 300]))
        ids = (*shared, *prompt_of(1000 * seed + i + 10, random.randrange(1, 90)))
        sampling = SamplingParams(
            max_tokens=random.randrange(1, max_tokens + 1),
            temperature=random.choice([0.0, 0.7, 1.3]),
            frequency_penalty=random.choice([0.0, 0.5]),
            seed=i,
            logprobs=random.choice([None, 1]),
        )
        made.append(Request(f"r{i}", ids, sampling, random.choice(["", "", "salt"])))
    return made


def undisturbed(make_engine: EngineMaker, requests: list[Request]) -> dict[str, Any]:
    engine = make_engine()
    tokens: dict[str, Any] = {r.id: [] for r in requests}
    for request in requests:
        engine.submit(request)
    for delta in collect(engine):
        tokens[delta.request_id] += [(t.id, t.logprob) for t in delta.tokens]
    return tokens


@pytest.mark.parametrize("drafts", [0, 2])
async def test_split_prefill_gives_the_same_tokens(
    split: Split, make_engine: EngineMaker, drafts: int
) -> None:
    """Law 2, for 100 requests, some of which have to wait for room."""
    requests = wanted(100)
    expected = undisturbed(make_engine, requests)
    limits = {"draft_tokens": drafts, "policy": lambda *_: Choice(drafts)}
    await split.start(prefills=True, **limits)
    decode = await split.start(prefills=False, pages=40, **limits)
    results = await asyncio.gather(*(split.run(r) for r in requests))
    for request, (tokens, _) in zip(requests, results, strict=True):
        assert tokens == expected[request.id]
    counts = counted(decode)
    assert counts.fetched > 20 and counts.pages >= counts.fetched
    assert not (counts.corrupted or counts.partly or counts.fallbacks or counts.broken)
    await split.idle()


async def test_only_what_nobody_computed_counts_as_cached(split: Split) -> None:
    """Law 4: of the prompt's pages, those that were in either cache before."""
    await split.start(prefills=True)
    first = await split.start(prefills=False)
    prompt = prompt_of(1, 64 * 5 + 10)
    request = Request("r", prompt, replace(PARAMS, max_tokens=1))
    _, cached = await split.run(request)
    assert cached == 0 and counted(first).pages == 5
    _, cached = await split.run(request)
    assert cached == 64 * 5 and counted(first).pages == 5
    await split.stop(first)
    second = await split.start(prefills=False)
    longer = replace(request, prompt_ids=(*prompt[:200], *prompt_of(2, 200)))
    _, cached = await split.run(longer)
    assert cached == 64 * 3 and counted(second).pages == 6
    await split.idle()


@pytest.mark.parametrize("times", [1, 2])
async def test_a_damaged_page_is_sent_again_and_then_computed(
    split: Split, make_engine: EngineMaker, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    request = Request("r", prompt_of(1, 400), PARAMS)
    expected = undisturbed(make_engine, [request])["r"]
    damages = 0
    send = Group.all_to_all

    def damaging(group: Group, out: Any, words: Any, *splits: Any) -> Any:
        nonlocal damages
        if len(words) in (1, 6) and damages < times:
            words[3 % len(words), 7] ^= 1 << 20
            damages += 1
        return send(group, out, words, *splits)

    monkeypatch.setattr(Group, "all_to_all", damaging)
    await split.start(prefills=True, step=Limits(16, 1024, 1024))
    decode = await split.start(prefills=False)
    assert (await split.run(request))[0] == expected
    counts = counted(decode)
    assert damages == counts.corrupted == times and counts.repeated == 1
    assert (counts.fetched, counts.partly, counts.fallbacks) == ((1, 0, 0), (0, 1, 0))[times - 1]
    assert counts.pages == (6, 3)[times - 1] and not counts.broken
    assert (await split.run(replace(request, id="s", prompt_ids=prompt_of(2, 300))))[0]
    assert counted(decode).fetched == counts.fetched + 1
    await split.idle()


async def test_a_slow_source_is_not_waited_for(
    make_engine: EngineMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its time limit a request is computed here; a source that is twice silent rests."""
    monkeypatch.setattr("rayseek.cluster.transfer_fetch.REST_S", 600.0)  # of a busy machine
    split = Split(make_engine, timeout_s=0.5)
    requests = [Request(f"r{i}", prompt_of(i, 300), PARAMS) for i in range(3)]
    expected = undisturbed(make_engine, requests)
    await split.start(prefills=True, pause_s=1.5)
    decode = await split.start(prefills=False)
    for number, request in enumerate(requests):
        assert (await split.run(request))[0] == expected[request.id]
        counts = counted(decode)
        assert counts.fallbacks == number + 1
        assert (counts.timeouts, counts.broken) == ((1, 0), (2, 1), (2, 1))[number]
    await split.idle()
    await close(split)


async def test_a_source_with_a_queue_is_waited_for(make_engine: EngineMaker) -> None:
    """It says that it works. Computed here, the prompts of an overload would slow every answer."""
    split = Split(make_engine, timeout_s=2.0)
    requests = [Request(f"r{i}", prompt_of(i, 300), PARAMS) for i in range(6)]
    expected = undisturbed(make_engine, requests)
    await split.start(prefills=True, pause_s=0.4, step=Limits(16, 300, 300))
    decode = await split.start(prefills=False)
    results = await asyncio.gather(*(split.run(request) for request in requests))
    for request, (tokens, _) in zip(requests, results, strict=True):
        assert tokens == expected[request.id]
    counts = counted(decode)
    assert (counts.fetched, counts.timeouts, counts.broken) == (6, 0, 0)
    await split.idle()
    await close(split)


@pytest.mark.parametrize("starving", [1000, 1])
async def test_who_waits_for_room_has_asked_nobody(
    make_engine: EngineMaker, monkeypatch: pytest.MonkeyPatch, starving: float
) -> None:
    """Its time begins when it asks. If others have all the room for too long, it queues."""
    monkeypatch.setattr("rayseek.cluster.transfer_fetch.STARVING", starving)
    split = Split(make_engine, timeout_s=2.0 if starving > 1 else 0.3)
    request = Request("r", prompt_of(1, 300), PARAMS)
    expected = undisturbed(make_engine, [request])["r"]
    await split.start(prefills=True)
    decode = await split.start(prefills=False)
    held = await asyncio.to_thread(
        in_engine, decode, lambda engine: engine.pool.take(engine.pool.available)
    )
    run = asyncio.create_task(split.run(request))
    async with asyncio.timeout(120):
        await asyncio.sleep(2.5 if starving > 1 else 0)
        while starving == 1 and not counted(decode).timeouts:
            await asyncio.sleep(0.02)

    def free(engine: Engine) -> None:
        engine.pool.release(held)
        decode.engine_loop.transfers.fetcher.begin_waiting(engine)

    await asyncio.to_thread(in_engine, decode, free)
    assert (await run)[0] == expected
    counts = counted(decode)
    assert (counts.fetched, counts.timeouts) == ((1, 0) if starving > 1 else (0, 1))
    assert not counts.broken
    await split.idle()
    await close(split)


@pytest.mark.parametrize("victim", ["source", "fetcher"])
async def test_death_in_the_middle_of_a_transfer(
    split: Split, make_engine: EngineMaker, victim: str
) -> None:
    requests = wanted(6, max_tokens=30)
    requests = [replace(r, prompt_ids=(*prompt_of(i, 300), *r.prompt_ids)) for i, r in
                enumerate(requests)]  # fmt: skip
    expected = undisturbed(make_engine, requests)
    source = await split.start(prefills=True, pause_s=0.2)
    decode = await split.start(prefills=False)
    runs = [asyncio.create_task(split.run(r)) for r in requests]
    while counted(source).sent < 2:
        await asyncio.sleep(0.005)
    assert await asyncio.to_thread(in_engine, source, lambda _: bool(source_of(source)._wanted))
    await split.stop(source if victim == "source" else decode)
    if victim == "fetcher":
        decode = await split.start(prefills=False)
    for request, run in zip(requests, runs, strict=True):
        assert (await run)[0] == expected[request.id]
    assert counted(decode).broken == (victim == "source")
    await split.idle()


def source_of(server: RankServer) -> PageSource:
    return server.engine_loop.transfers.source


async def test_a_cancelled_fetch_leaves_the_connection_sound(
    split: Split, make_engine: EngineMaker
) -> None:
    request = Request("r", prompt_of(1, 400), PARAMS)
    expected = undisturbed(make_engine, [request])["r"]
    source = await split.start(prefills=True, pause_s=0.1)
    decode = await split.start(prefills=False)
    for number in range(8):
        other = replace(request, id=f"c{number}", prompt_ids=prompt_of(10 + number, 500))
        run = asyncio.create_task(split.run(other))
        sent = counted(source).sent
        while counted(source).sent == sent:
            await asyncio.sleep(0.002)
        run.cancel()
    assert (await split.run(request))[0] == expected
    counts = counted(decode)
    assert counts.fetched == 1 and not (counts.broken or counts.fallbacks or counts.corrupted)
    await split.idle()


async def test_pages_of_another_model_are_refused(split: Split, make_engine: EngineMaker) -> None:
    request = Request("r", prompt_of(1, 200), PARAMS)
    expected = undisturbed(make_engine, [request])["r"]
    source = await split.start(prefills=True)
    source_of(source)._fingerprint = "another"
    decode = await split.start(prefills=False)
    assert (await split.run(request))[0] == expected
    assert counted(decode).fallbacks == counted(decode).broken == 1
    await split.idle()


async def test_a_refused_or_failed_prefill_ends_only_its_own_fetch(
    split: Split, make_engine: EngineMaker
) -> None:
    requests = [Request(f"r{i}", prompt_of(i, 300), PARAMS) for i in range(3)]
    expected = undisturbed(make_engine, requests)
    source = await split.start(prefills=True)
    decode = await split.start(prefills=False)
    engine = source.engine_loop._engine
    whole = engine.limits
    for request, limits in zip(requests, (whole, replace(whole, max_queue=0), whole), strict=True):
        engine.limits = limits
        assert (await split.run(request))[0] == expected[request.id]
    counts = counted(decode)
    assert (counts.fetched, counts.fallbacks, counts.broken) == (2, 1, 0)
    await split.idle()


async def test_a_connection_that_cannot_be_made_costs_a_fetch(
    split: Split, make_engine: EngineMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No address, no thread, no memory for it: the rank computes the prompt, and lives."""
    requests = [Request(f"r{i}", prompt_of(i, 300), PARAMS) for i in range(2)]
    expected = undisturbed(make_engine, requests)
    await split.start(prefills=True)
    decode = await split.start(prefills=False)

    def never(host: str) -> None:
        raise OSError("cannot listen")

    monkeypatch.setattr("rayseek.cluster.transfer_fetch.open_store", never)
    found = await asyncio.gather(*(split.run(request) for request in requests))
    assert [tokens for tokens, _ in found] == [expected[r.id] for r in requests]
    counts = counted(decode)
    assert counts.fallbacks == 2 and decode.engine_loop.alive
    await split.idle()


async def test_nothing_is_left_behind(make_engine: EngineMaker) -> None:
    """Threads, connections and holds after ranks have come and gone."""
    before = sorted(t.name for t in threading.enumerate())
    for _ in range(3):
        split = Split(make_engine)
        source = await split.start(prefills=True)
        await split.start(prefills=False)
        await asyncio.gather(*(split.run(r) for r in wanted(6)))
        await split.stop(source)
        await split.start(prefills=True)
        await split.idle()
        await close(split)
    async with asyncio.timeout(120):
        while extra := [
            t.name for t in threading.enumerate()
            if t.name not in before and t.name.startswith(("fetch", "source", "transfers"))
        ]:  # fmt: skip
            await asyncio.sleep(0.05)
    assert not extra
