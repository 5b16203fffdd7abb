"""Experts that come from other ranks: who is asked, what is refused, and that nobody notices."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayseek.cluster import copies
from rayseek.cluster.build import build_engine
from rayseek.cluster.copies import Asking, CopyServer, Sources
from rayseek.cluster.engine import run_to_end
from rayseek.cluster.placement import ExpertPlacement
from rayseek.cluster.plan import Member, UnitPlan, Wanted, next_plan
from rayseek.cluster.request import Request, SamplingParams
from rayseek.model.expert_slots import ExpertCopy
from tests.cluster.company import SETTINGS, Answers, answers, chosen, unit

ANYWHERE = ExpertPlacement(0, {1: (0, 1, 1, 2)}, 2, (0, 0))  # expert 1 is on both holders


def crew(names: list[int]) -> list[Member]:
    return [Member("a", "attention", "n", "h:1")] + [
        Member(f"e{i}", "expert", "n", "h:1", f"copies-of-e{i}") for i in names
    ]


@given(st.integers(1, 4), st.integers(0, 12), st.data())
def test_those_are_asked_who_are_there_and_had_it(
    experts: int, redundant: int, data: st.DataObject
) -> None:
    wanted = Wanted(1, experts, redundant, 8, 2, (1, 2))
    loads = {
        layer: data.draw(st.lists(st.floats(0, 9), min_size=8, max_size=8)) for layer in (1, 2)
    }
    before = next_plan(None, crew(list(range(experts))), wanted, loads)
    assert isinstance(before, UnitPlan) and before.sources is None
    present = crew(data.draw(st.lists(st.integers(0, experts), unique=True, min_size=1)))
    after = next_plan(before, present, wanted, loads, rebalance=True)
    assert isinstance(after, UnitPlan) and after.sources is not None
    for layer in (1, 2):
        for expert in range(8):
            had = {
                before.members[rank].copies
                for holder, rank in enumerate(before.holders)
                if expert in before.placement.experts_of(holder, layer)
            }
            asked = after.sources.of(layer, expert)
            assert set(asked) == had & {m.copies for m in present} and len(set(asked)) == len(asked)


@pytest.fixture
def serve() -> object:
    """Starts a server that gives what a function gives; returns its address."""
    servers: list[CopyServer] = []

    def start(give: Callable[[int, int], ExpertCopy]) -> str:
        servers.append(CopyServer(give))
        return f"127.0.0.1:{servers[-1].start('127.0.0.1')}"

    yield start
    for server in servers:
        server.stop()


Serve = Callable[[Callable[[int, int], ExpertCopy]], str]


def test_a_copy_arrives_as_it_was_given(serve: Serve) -> None:
    data = bytes(range(256)) * 30_000  # more than gRPC takes by itself
    address = serve(lambda layer, expert: ExpertCopy(data + bytes([layer, expert]), b"digest"))
    with Asking(Sources(ANYWHERE, ("", address)), first=0) as asking:
        assert asking.fetch(1, 2) == ExpertCopy(data + b"\x01\x02", b"digest")
        assert asking.fetch(1, 0) is None  # its only holder is gone
        assert asking.fetch(7, 0) is None


def test_who_lacks_an_expert_is_asked_for_others_and_who_fails_is_not(serve: Serve) -> None:
    asked: list[str] = []

    def lacks(layer: int, expert: int) -> ExpertCopy:
        asked.append("lacks")
        raise KeyError(expert)

    def fails(layer: int, expert: int) -> ExpertCopy:
        asked.append("fails")
        raise OSError("the disk is gone")

    good = ExpertCopy(b"data", b"digest")
    for other, times in ((lacks, 3), (fails, 1)):
        asked.clear()
        with Asking(Sources(ANYWHERE, (serve(other), serve(lambda *_: good))), first=0) as asking:
            assert [asking.fetch(1, 1) for _ in range(3)] == [good] * 3
        assert len(asked) == times
    with Asking(Sources(ANYWHERE, (serve(fails), serve(lacks))), first=1) as asking:
        assert asking.fetch(1, 1) is None


def test_a_call_that_grpc_forgets_holds_up_nobody(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own time limit, which is not reached here, can not be relied on."""
    monkeypatch.setattr(copies, "PATIENCE_S", 2.0)
    goes_on = threading.Event()

    def silent(layer: int, expert: int) -> ExpertCopy:
        goes_on.wait(300)
        raise KeyError(expert)

    good = ExpertCopy(b"data", b"digest")
    with Asking(Sources(ANYWHERE, (serve(silent), serve(lambda *_: good))), first=0) as asking:
        assert asking.fetch(1, 1) == good
        assert asking.fetch(1, 1) == good
    goes_on.set()


def test_strangers_get_no_weights(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "ours")
    address = serve(lambda *_: ExpertCopy(b"data", b"digest"))
    with Asking(Sources(ANYWHERE, (address, address)), first=0) as asking:
        assert asking.fetch(1, 0) is not None
    monkeypatch.setenv("RAY_AUTH_TOKEN", "theirs")
    with Asking(Sources(ANYWHERE, (address, address)), first=0) as asking:
        assert asking.fetch(1, 0) is None


async def test_damaged_copies_are_healed_in_mid_stream(tiny_path: Path) -> None:
    """A rebalance while tokens flow; what one of the ranks gives has a flipped bit."""
    requests = [
        Request(f"r{i}", tuple(range(3 + i, 40)), SamplingParams(max_tokens=200, seed=i))
        for i in range(12)
    ]
    engine = build_engine(tiny_path, SETTINGS)
    undisturbed: Answers = {request.id: [] for request in requests}
    for request in requests:
        engine.submit(request)
    run_to_end(engine, lambda d: undisturbed[d.request_id].extend(map(chosen, d.tokens)))

    async with unit(tiny_path, experts=2, redundant=2) as company:
        before = company._plans.plan
        assert before is not None
        holders = [company.actors[before.members[rank].name].seat for rank in before.holders]
        server = holders[0]._copies
        assert server is not None
        give = server._give

        def damaged(layer: int, expert: int) -> ExpertCopy:
            copy = give(layer, expert)
            data = bytearray(copy.data)
            data[len(data) // 3] ^= 16
            return replace(copy, data=bytes(data))

        server._give = damaged
        asked = asyncio.ensure_future(answers(company, requests))
        await asyncio.sleep(0.1)
        for layer in before.placement.slots:
            company._load._rows[layer][:] = [9, 1, 9, 1, 9, 1, 9, 1]
        await company.rebalance()
        assert await asked == undisturbed
        async with asyncio.timeout(120):
            while (after := company._plans.plan) is before:
                await asyncio.sleep(0.05)
        assert after is not None and after.placement.slots != before.placement.slots
        good, bad = [(await seat.pulse()).taken for seat in holders]
        assert good is not None and bad is not None
        assert good.copied and not good.refused
        assert bad.refused and not bad.copied and bad.read > bad.refused
