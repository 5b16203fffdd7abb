"""A death whose experts the survivors have memory for, and one where they wait for a successor;
and who is to end a group when nobody is left."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from rayseek.cluster.build import build_engine
from rayseek.cluster.build_unit import ExpertLoader
from rayseek.cluster.engine import run_to_end
from rayseek.cluster.formed import Line
from rayseek.cluster.group import ExchangeBroken, open_store
from rayseek.cluster.placement import ExpertPlacement
from rayseek.cluster.rank import ExpertRank, Seat
from rayseek.cluster.request import Request, SamplingParams
from rayseek.cluster.succession import Room
from rayseek.kernels.select import choose_ops
from rayseek.model.checkpoint import Checkpoint
from rayseek.model.expert_slots import ExpertSlots, ExpertsReleased, ExpertStore
from tests.cluster.company import SETTINGS, Answers, Company, answers, chosen, unit

REQUESTS = [
    Request(f"r{i}", tuple(range(3 + i, 60)), SamplingParams(max_tokens=40, seed=i))
    for i in range(12)
]


@pytest.fixture(scope="module")
def undisturbed(tiny_path: Path) -> Answers:
    engine = build_engine(tiny_path, SETTINGS)
    found: Answers = {request.id: [] for request in REQUESTS}
    for request in REQUESTS:
        engine.submit(request)
    run_to_end(engine, lambda d: found[d.request_id].extend(map(chosen, d.tokens)))
    return found


def slots_of(seat: Seat) -> ExpertSlots:
    assert seat._expert_loader is not None and seat._expert_loader._slots is not None
    return seat._expert_loader._slots


def holders(company: Company) -> list[Seat]:
    """Those that live."""
    seats = [a.seat for a in company.actors.values() if not a.dead.is_set()]
    return [seat for seat in seats if seat.role == "expert"]


async def test_survivors_take_over_in_place(tiny_path: Path, undisturbed: Answers) -> None:
    """8 experts on 3 holders, 3 on each; on two they need 4, for which 7 slots would be too few
    if the old ones stayed: they go layer by layer."""
    async with unit(tiny_path, experts=3) as company:
        company._plans.wanted = replace(company._plans.wanted, room=Room(6, whole_layers=True))
        asked = asyncio.ensure_future(answers(company, REQUESTS))
        await asyncio.sleep(0.2)
        before = {seat.name: slots_of(seat) for seat in holders(company)}
        await company.kill("expert", Random(1))
        await company.adopted(experts=2)
        for seat in holders(company):
            assert not before[seat.name].layers and len(slots_of(seat).lists[1]) == 4
            with pytest.raises(ExpertsReleased):
                before[seat.name].compute(1, None, None, None)  # type: ignore[arg-type]
        assert await asked == undisturbed


async def test_nobody_waits_for_one_who_hangs(tiny_path: Path, undisturbed: Answers) -> None:
    """Its connections stay open for as long as it takes to end it, which may be for ever."""
    patient = SETTINGS.model_copy(update={"step_timeout_s": 600})
    hangs, released = threading.Event(), threading.Event()
    async with unit(tiny_path, experts=2, settings=patient) as company:
        asked = asyncio.ensure_future(answers(company, REQUESTS))
        await asyncio.sleep(0.2)
        victim = holders(company)[0]

        def hang(*_: object) -> None:
            hangs.set()
            released.wait()
            raise ExpertsReleased

        slots_of(victim).compute = hang  # type: ignore[method-assign, assignment]
        assert await asyncio.to_thread(hangs.wait, 120)
        death = asyncio.ensure_future(company.actors[victim.name].die())
        try:
            assert await asyncio.wait_for(asked, 300) == undisturbed
            assert not death.done()
        finally:
            released.set()
            await death


@pytest.mark.parametrize("busy", [True, False])
async def test_an_orphan_beside_one_who_hangs_comes_free(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, busy: bool
) -> None:
    """The leader has died where another hangs for ever: nobody is left to end their group, in
    which it stands in an exchange, or sleeps."""
    monkeypatch.setattr("rayseek.cluster.rank.ORPHAN_S", 0.5)
    monkeypatch.setattr("rayseek.cluster.formed.BELL_S", 0.2)
    patient = SETTINGS.model_copy(update={"step_timeout_s": 600})
    hangs, released = threading.Event(), threading.Event()
    async with unit(tiny_path, experts=2, settings=patient) as company:
        victim, orphan = [a.seat for a in company.actors.values() if a.seat.role == "expert"]
        assert isinstance(orphan, ExpertRank)
        async with asyncio.timeout(120):
            while await orphan.epoch() < 0:
                await asyncio.sleep(0.02)

        def hang(*_: object) -> None:
            hangs.set()
            released.wait()
            raise ExpertsReleased

        asked = asyncio.ensure_future(answers(company, REQUESTS)) if busy else None
        if busy:
            slots_of(victim).compute = hang  # type: ignore[method-assign, assignment]
            assert await asyncio.to_thread(hangs.wait, 120)
        monkeypatch.setattr(company, "_kill", lambda _: None)  # nor can it reach anybody's node
        for task in company._tasks:
            task.cancel()
        try:
            async with asyncio.timeout(120):
                while not await orphan.doubts():
                    await asyncio.sleep(0.02)
            assert await orphan.works_for() == "unit", "its group may work yet"
            await orphan.part("unit")
            assert await orphan.epoch() < 0
            monkeypatch.setattr("rayseek.cluster.rank.BOND_S", 0.0)
            assert await orphan.works_for() is None
            await orphan.engage("other")
            assert not await orphan.doubts()
        finally:
            released.set()
            if asked is not None:
                asked.cancel()
                await asyncio.wait([asked])


def test_a_store_that_does_not_answer_holds_up_nobody() -> None:
    forever = threading.Event()
    line = Line(open_store("127.0.0.1"))
    assert line.ask(lambda store: store.add("key", 1)) == 1
    with pytest.raises(ExchangeBroken, match="does not answer within"):
        line.ask(lambda _: forever.wait(), 0.05)
    assert line.stuck
    forever.set()


async def test_who_cannot_take_over_says_so_and_waits(
    tiny_path: Path, undisturbed: Answers
) -> None:
    async with unit(tiny_path, experts=2) as company:
        company._plans.wanted = replace(company._plans.wanted, room=Room(6))
        asked = asyncio.ensure_future(answers(company, REQUESTS))
        await asyncio.sleep(0.2)
        kept = {seat.name: slots_of(seat) for seat in holders(company)}
        await company.kill("expert", Random(1))
        sentence = (
            "unit: 8 experts of a layer do not fit into the memory of 1 ranks, 6 in each: waiting "
            "for another rank"
        )
        async with asyncio.timeout(120):
            while sentence not in (await company.status()).problems:
                await asyncio.sleep(0.02)
        await asyncio.sleep(1.5)  # two looks of the leader
        (survivor,) = holders(company)
        assert slots_of(survivor) is kept[survivor.name] and len(slots_of(survivor).layers) == 2
        await company.hire()
        assert await asked == undisturbed
        assert slots_of(survivor) is kept[survivor.name], "its experts were never touched"
        assert (await company.status()).problems == ()


def test_what_was_loaded_and_never_used_makes_room(tiny_path: Path) -> None:
    """Plans that are given up leave nothing; what computes is whole until its group is broken."""
    loader = ExpertLoader(ExpertStore(Checkpoint.open(tiny_path), choose_ops().ops))

    def load(*experts: int, release: bool = False) -> ExpertSlots:
        layers = dict.fromkeys((1, 2), experts)
        return loader.load(ExpertPlacement(0, layers, len(experts), (0,)), 0, None, release)

    used = load(0, 1, 2)
    loader.use(used)
    given_up = load(1, 2, 3)
    assert load(1, 2, 3) is given_up
    newer = load(3, 4, 5)
    assert len(used.layers) == 2 and not given_up.layers
    assert loader.taken.read == 2 * (3 + 1 + 2)
    last = load(5, 6, release=True)
    assert not used.layers and not newer.layers
    assert last.lists == {1: (5, 6), 2: (5, 6)} and loader.taken.read == 2 * (3 + 1 + 2 + 1)
