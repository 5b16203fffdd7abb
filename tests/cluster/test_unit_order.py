"""Who belongs to a unit, who is listed, who is killed, and how a unit stops (company.py)."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
import time
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rayseek.cluster.config import ExchangeSettings
from rayseek.cluster.crew import Crew, Hand, start
from rayseek.cluster.dispatch import Dispatcher
from rayseek.cluster.engine import Engine
from rayseek.cluster.expert_load import ExpertLoad
from rayseek.cluster.plan import Member, Pulse, Role, UnitPlan, Wanted, next_plan
from rayseek.cluster.plan_keeper import PlanKeeper
from rayseek.cluster.rank import Elsewhere, ExpertRank, Rank, Started
from rayseek.cluster.request import FinishReason, Request, SamplingParams
from tests.cluster.company import SETTINGS, Company, dispatcher, unit

LONG = Request("long", tuple(range(3, 40)), SamplingParams(max_tokens=300, seed=1))


async def finish_of(company: Company, request: Request = LONG) -> FinishReason | None:
    finish = None
    async with dispatcher(company) as ranks:
        async for delta in ranks.generate(request):
            finish = delta.finish
    return finish


async def test_a_rank_of_other_weights_or_settings_is_refused(tiny_path: Path) -> None:
    async with unit(tiny_path, experts=1, spares=1) as company:
        name = (await company.status()).expert_ranks[1]
        other = replace(company._company.hands[name].started, fingerprint="fp_other")
        await company.detach(name)
        assert not await company.attach("unit", company.actors[name], other)
        company._company.hands.clear()  # so that there is something to complain of
        assert "weights, files or arithmetic are fp_other instead of fp_" in str(
            (await company.status()).problems
        )


def test_what_must_agree_is_named() -> None:
    exchange = ExchangeSettings(mode="fixed", rebalance_s=1)
    newcomer = Started(Member("e", "expert", "n", "h:1"), None, "fp_1", exchange)
    fixed = Crew("unit", ExchangeSettings(mode="fixed"))
    assert fixed.misfit(newcomer) is None, "the rest is the leader's"
    other = Crew("unit", ExchangeSettings(mode="auto", micro_batches=2))
    why = other.misfit(newcomer) or ""
    assert "exchange.mode is fixed instead of auto" in why and "micro_batches is 1" in why


async def test_an_expert_rank_works_for_one_unit(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever two leaders believe: the rank knows, and lets go only when its unit is dead."""
    async with unit(tiny_path, experts=1) as company:
        (actor,) = [a for a in company.actors.values() if isinstance(a.seat, ExpertRank)]
        rank, plan = actor.seat, company._plans.plan
        assert isinstance(rank, ExpertRank) and plan is not None
        assert await rank.works_for() == "unit"
        with pytest.raises(Elsewhere, match="works for unit, not for other"):
            await rank.engage("other")
        with pytest.raises(Elsewhere):
            await rank.prepare(replace(plan, epoch=2**60), "other")
        monkeypatch.setattr("rayseek.cluster.rank.BOND_S", 0.0)
        assert await rank.works_for() == "unit", "its leader is silent, but the group works"
        for task in company._tasks:  # the leader dies, and its attention rank with it
            task.cancel()
        for other in company.ranks:
            await company.actors[other.name].die()
        async with asyncio.timeout(120):
            while await rank.works_for() is not None:
                await asyncio.sleep(0.02)
        assert await rank.engage("other") >= plan.epoch, "later plans are to be larger"
        with pytest.raises(Elsewhere):
            await rank.pulse("unit")


async def test_a_rank_that_went_elsewhere_is_not_killed(tiny_path: Path) -> None:
    async with unit(tiny_path, experts=2) as company:
        name = (await company.status()).expert_ranks[0]
        seat = company.actors[name].seat
        assert isinstance(seat, ExpertRank) and seat._participant is not None
        seat._unit = "other"  # after a long stall of our leader
        seat._participant.leave()
        assert await company.adopted(experts=1)
        assert name not in (await company.status()).expert_ranks
        assert not company.actors[name].dead.is_set()


async def test_what_breaks_elsewhere_breaks_nothing_here() -> None:
    """An expert rank that has parted works for another unit, whose epochs are as large as ours."""
    crew, breaks = Crew("unit"), asyncio.Queue[SimpleNamespace]()
    actor = SimpleNamespace(next_break=SimpleNamespace(remote=lambda _: breaks.get()))
    started = Started(Member("e", "expert", "n", ""), None, "", ExchangeSettings())

    async def broken(epoch: int) -> int:
        breaks.put_nowait(SimpleNamespace(epoch=epoch))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return crew.broken_epoch

    old = crew.join(actor, started)
    assert await broken(7) == 7
    crew.part(old, "it works for other, not for unit")
    assert await broken(8) == 7
    crew.join(actor, started)  # it comes back
    assert old.watch is not None and old.watch.done()
    assert await broken(9) == 9
    crew.hands["e"].watch.cancel()  # type: ignore[union-attr]


async def test_ranks_are_listed_once_they_follow_a_plan(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with unit(tiny_path, attention=2) as company:
        (old, dying) = company.ranks
        await company.actors[dying.name].die()

        async def never(*_: Any) -> None:
            await asyncio.Event().wait()

        monkeypatch.setattr("rayseek.cluster.rank.Rank.commit", never)
        async with asyncio.timeout(120):
            while len(company._company.hands) < 2:
                await asyncio.sleep(0.02)
        listed = [address.name for address in (await company.status()).ranks]
        assert listed == [old.name], "but it follows no plan yet"


async def test_a_process_that_does_not_answer_is_replaced_soon(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked once, and then killed."""
    monkeypatch.setattr("rayseek.cluster.unit.SILENT_S", 0.5)
    monkeypatch.setattr("rayseek.cluster.unit.PULSE_S", 0.05)
    async with unit(tiny_path, experts=2) as company:
        hung = (await company.status()).expert_ranks[0]
        asked = 0
        pulse = company.actors[hung].seat.pulse

        async def counting(unit: str | None = None) -> Any:
            nonlocal asked
            asked += 1
            return await pulse(unit)

        company.actors[hung].seat.pulse = counting  # type: ignore[method-assign]
        company.actors[hung].answers.clear()
        assert await company.adopted(experts=1)
        assert company.actors[hung].dead.is_set() and asked <= 1


async def test_a_stalled_step_names_rank_layer_and_exchange(
    tiny_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One expert rank computes for ever: it is named, and who waits for it in which exchange."""
    settings = SETTINGS.model_copy(update={"step_timeout_s": 1.0})
    async with unit(tiny_path, experts=2, settings=settings) as company:
        name = (await company.status()).expert_ranks[0]
        loader = company.actors[name].seat._expert_loader
        assert loader is not None and loader._slots is not None
        release = threading.Event()

        compute = loader._slots.compute

        def stuck(*arguments: Any) -> Any:
            release.wait(300)
            return compute(*arguments)

        loader._slots.compute = stuck  # type: ignore[method-assign]
        asked = asyncio.ensure_future(finish_of(company))
        logging.getLogger("rayseek").addHandler(caplog.handler)
        try:
            async with asyncio.timeout(120):
                while not (said := [r.getMessage() for r in caplog.records if "killing" in r.msg]):
                    await asyncio.sleep(0.02)
        finally:
            release.set()
        assert await asked is FinishReason.LENGTH
        pattern = rf"killing {name}: it has been at forward pass \d+, layer 1, experts for (\d+) s"
        found = re.search(pattern, said[0])
        assert found is not None, said
        assert re.search(r"attention0-\d at forward pass \d+, layer 1, (dispatch|return)", said[0])


async def test_a_unit_that_stops_hands_its_requests_over(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayseek.cluster.unit.FINISH_S", 0.2)
    async with unit(tiny_path) as company, dispatcher(company) as ranks:
        begun = asyncio.Event()
        (rank,) = company.ranks
        step = rank.engine.step

        def slowly() -> Any:
            time.sleep(0.01)
            return step()

        rank.engine.step = slowly  # type: ignore[method-assign]

        async def ask() -> FinishReason | None:
            finish = None
            async for delta in ranks.generate(LONG):
                begun.set()
                finish = delta.finish
            return finish

        asked = asyncio.ensure_future(ask())
        await begun.wait()
        await company.retire()
        async with asyncio.timeout(120):
            while ranks.moved_lately(60) != ["long"]:
                await asyncio.sleep(0.01)
        await company.actors[rank.name].die()  # Serve ends it; here its unit starts another
        assert await asked is FinishReason.LENGTH


class Asked:
    """An actor's handle; whoever calls `pulse` waits for `answer`."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[Pulse] = asyncio.get_running_loop().create_future()
        self.calls = 0

    @property
    def pulse(self) -> Asked:
        return self

    def remote(self, unit: str) -> asyncio.Future[Pulse]:
        self.calls += 1
        return self.answer


async def test_who_hangs_delays_nobodys_answer() -> None:
    crew, well, hung = Crew("unit"), Asked(), Asked()
    for name, actor in {"well": well, "hung": hung}.items():
        started = Started(Member(name, "expert", "n", ""), None, "", ExchangeSettings())
        crew.hands[name] = Hand(actor, started)
    fine = Pulse(1, 0, "agreement", waits=True, idle=False, since_s=0)
    well.answer.set_result(fine)
    assert await crew.pulses(0.01, 60) == {"well": fine}
    assert await crew.pulses(0.01, 0) == {"well": fine, "hung": None}
    assert (well.calls, hung.calls) == (2, 1)
    hung.answer.set_result(fine)
    assert await crew.pulses(0.01, 60) == {"well": fine, "hung": fine}


async def test_who_hangs_while_it_starts_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by how long its start takes, which may be half an hour, but by its silence."""
    monkeypatch.setattr("rayseek.cluster.crew.STARTING_S", 0.1)
    monkeypatch.setattr("rayseek.cluster.crew.LOOK_S", 0.02)
    loaded, signs = asyncio.Event(), 0

    async def begin() -> str:
        await loaded.wait()
        return "started"

    async def sign_of_life() -> int:
        nonlocal signs
        signs += 1
        if signs == 1:
            await asyncio.sleep(0.3)  # it waits for a place
        if signs == 10:
            await asyncio.Event().wait()
        return 0

    actor = SimpleNamespace(
        start=SimpleNamespace(remote=begin), epoch=SimpleNamespace(remote=sign_of_life)
    )
    with pytest.raises(TimeoutError):
        await start(actor, 60)
    assert signs == 10
    loaded.set()
    assert await start(actor, 60) == "started"
    signs = 0
    assert await start(actor, 60) == "started"


class Obedient:
    """An actor's handle; whatever it is asked for, it has done."""

    def __getattr__(self, name: str) -> Obedient:
        return self

    async def remote(self, *arguments: object) -> int:
        return 2**62  # as an epoch: it follows every plan


async def test_a_leader_that_succeeds_another_waits_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two expert ranks is gone for good; the other has worked for the dead leader."""
    monkeypatch.setattr("rayseek.cluster.plan_keeper.SUCCESSOR_S", 0.1)
    monkeypatch.setattr("rayseek.cluster.plan_keeper.LOOK_S", 0.05)
    wanted, crew = Wanted(1, 2, 0, 4, 1, (1,)), Crew("unit")
    keeper = PlanKeeper(crew, wanted, ExpertLoad((1,), 4, 60), lambda _: None, 5)
    roles: tuple[Role, ...] = ("attention", "expert")
    for role in roles:
        started = Started(Member(role, role, "n", ""), None, "", ExchangeSettings())
        crew.hands[role] = Hand(Obedient(), started)
    task = asyncio.create_task(keeper.keep())
    keeper.heard_of(-1)
    await asyncio.sleep(0.5)
    assert keeper.plan is None and keeper.problems == ["waiting for 1 more ranks"]
    keeper.heard_of(7)
    async with asyncio.timeout(120):
        while keeper.plan is None:
            await asyncio.sleep(0.01)
    task.cancel()


async def test_whoever_asks_for_problems_gets_what_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every ingress and every expert rank asks, again and again; a plan is gone through once."""
    wanted, crew = Wanted(2, 0, 4, 4, 1, (1,)), Crew("unit")
    keeper = PlanKeeper(crew, wanted, ExpertLoad((1,), 4, 60), lambda _: None, 5)
    for name in ("a", "b"):
        started = Started(Member(name, "attention", "n", ""), None, "", ExchangeSettings())
        crew.hands[name] = Hand(Obedient(), started)
    task = asyncio.create_task(keeper.keep())
    async with asyncio.timeout(120):
        while keeper.plan is None or len(keeper.plan.members) < 2:
            await asyncio.sleep(0.01)
    monkeypatch.delattr("rayseek.cluster.placement.ExpertPlacement.single_homed")
    assert keeper.problems == []
    keeper.plan = replace(keeper.plan, members=keeper.plan.members[:1])
    assert keeper.problems == ["1 of 2 attention ranks take part"]
    task.cancel()


async def test_a_leader_answers_while_it_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks a leader waits a second for it; a plan for many ranks takes longer."""
    plans, answered = threading.Event(), threading.Event()

    def slowly(*_: object, **__: object) -> str:
        plans.set()
        return "there is none" if answered.wait(20) else "nobody could answer"

    monkeypatch.setattr("rayseek.cluster.plan_keeper.next_plan", slowly)
    wanted = Wanted(1, 0, 0, 4, 1, (1,))
    keeper = PlanKeeper(Crew("unit"), wanted, ExpertLoad((1,), 4, 60), lambda _: None, 5)
    keeper.rebalance()
    task = asyncio.create_task(keeper.keep())
    async with asyncio.timeout(120):
        while not plans.is_set():
            await asyncio.sleep(0.01)
        assert keeper.problems == ["it starts"]
        answered.set()
        while keeper.problems != ["there is none"]:
            await asyncio.sleep(0.01)
    task.cancel()


async def test_nobody_prepares_for_a_plan_that_is_outdated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody dies while it is made. What a rank is asked to load, it loads to the end."""
    asked: list[object] = []
    crew, loop = Crew("unit"), asyncio.get_running_loop()

    class Busy(Obedient):
        def remote(self, *arguments: object) -> Coroutine[Any, Any, int]:
            asked.extend(arguments)
            return super().remote(*arguments)

    for name in ("a", "b"):
        started = Started(Member(name, "attention", "n", ""), None, "", ExchangeSettings())
        crew.hands[name] = Hand(Busy(), started)

    async def die() -> None:
        crew.part(crew.hands["b"], "it died")

    def slowly(*arguments: Any, **more: Any) -> UnitPlan | str:
        if "b" in crew.hands:
            asyncio.run_coroutine_threadsafe(die(), loop).result(60)
        return next_plan(*arguments, **more)

    monkeypatch.setattr("rayseek.cluster.plan_keeper.next_plan", slowly)
    wanted = Wanted(2, 0, 0, 4, 1, (1,))
    keeper = PlanKeeper(crew, wanted, ExpertLoad((1,), 4, 60), lambda _: None, 5)
    task = asyncio.create_task(keeper.keep())
    async with asyncio.timeout(120):
        while keeper.problems != ["waiting for 1 more ranks"]:
            await asyncio.sleep(0.01)
    assert not asked
    task.cancel()


async def test_a_balance_that_pays_is_sought_now_and_then() -> None:
    wanted, crew = Wanted(2, 0, 0, 4, 1, (1,)), Crew("unit")
    load = ExpertLoad((1,), 4, 60)
    keeper = PlanKeeper(crew, wanted, load, lambda _: None, 5)
    for name in ("a", "b"):
        started = Started(Member(name, "attention", "n", ""), None, "", ExchangeSettings())
        crew.hands[name] = Hand(Obedient(), started)
    tasks = [asyncio.create_task(keeper.keep())]
    async with asyncio.timeout(120):
        while keeper.plan is None or len(keeper.plan.members) < 2:
            await asyncio.sleep(0.01)
        even = keeper.plan
        tasks.append(asyncio.create_task(keeper.keep_balance(0.01, 0.05)))
        await asyncio.sleep(0.2)
        assert keeper.plan is even
        load._rows[1][:] = 5, 5, 1, 1
        while keeper.plan is even:
            await asyncio.sleep(0.01)
    first = keeper.plan.placement.experts_of(0, 1)
    assert len({0, 1} & {*first}) == 1, "the two that have most to do are apart"
    for task in tasks:
        task.cancel()


async def test_the_first_plan_waits_for_ranks_that_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long they take; not for those that give no sign, and not for those that failed."""
    monkeypatch.setattr("rayseek.cluster.plan_keeper.COMING_S", 0.1)
    monkeypatch.setattr("rayseek.cluster.plan_keeper.LOOK_S", 0.05)
    wanted, crew = Wanted(3, 0, 0, 4, 1, (1,)), Crew("unit")
    keeper = PlanKeeper(crew, wanted, ExpertLoad((1,), 4, 60), lambda _: None, 5)

    def come(name: str) -> None:
        started = Started(Member(name, "attention", "n", ""), None, "", ExchangeSettings())
        crew.hands[name] = Hand(Obedient(), started)

    crew.loading |= {"b", "c"}
    come("a")
    task = asyncio.create_task(keeper.keep())
    await asyncio.sleep(0.5)
    assert keeper.plan is None and keeper.problems == ["waiting for 2 more ranks"]
    crew.loading.remove("b")
    come("b")
    await asyncio.sleep(0.3)
    assert keeper.plan is None
    crew.loading.remove("c")  # it could not be loaded
    async with asyncio.timeout(120):
        while keeper.plan is None:
            await asyncio.sleep(0.01)
    assert [m.name for m in keeper.plan.members] == ["a", "b"]
    task.cancel()


async def test_a_rank_that_loads_for_long_is_in_the_first_plan(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayseek.cluster.plan_keeper.COMING_S", 0.0)
    load = Rank._load

    def slowly(rank: Rank, *arguments: Any) -> Any:
        if "attention1" in rank.name:
            time.sleep(2)
        return load(rank, *arguments)

    monkeypatch.setattr(Rank, "_load", slowly)
    async with unit(tiny_path, attention=2) as company:
        plan = company._plans.plan
        assert plan is not None and len(plan.members) == 2
        assert not company._company.loading


async def test_who_parts_while_it_is_asked_is_left_out() -> None:
    crew, going = Crew("unit"), Asked()
    started = Started(Member("going", "expert", "n", ""), None, "", ExchangeSettings())
    hand = crew.hands["going"] = Hand(going, started)
    asyncio.get_running_loop().call_later(0.05, crew.part, hand, "it died")
    assert await crew.pulses(5, 0) == {}


async def test_who_comes_back_while_it_is_asked_is_left_out() -> None:
    """An expert rank that was elsewhere for a moment: what it was asked before is nobody's now."""
    crew = Crew("unit")
    started = Started(Member("e", "expert", "n", ""), None, "", ExchangeSettings())
    hand = crew.hands["e"] = Hand(Asked(), started)

    def return_() -> None:
        crew.part(hand, "it works for other, not for unit")
        crew.hands["e"] = Hand(Asked(), started)

    asyncio.get_running_loop().call_later(0.05, return_)
    assert await crew.pulses(5, 0) == {}


async def test_where_all_are_slow_nobody_is_silent_yet() -> None:
    """A machine on which answers take long is busy; patience is three times what it was at most."""
    crew, slow, hung = Crew("unit"), Asked(), Asked()
    for name, actor in {"slow": slow, "hung": hung}.items():
        started = Started(Member(name, "expert", "n", ""), None, "", ExchangeSettings())
        crew.hands[name] = Hand(actor, started)
    fine = Pulse(1, 0, "agreement", waits=True, idle=False, since_s=0)
    asyncio.get_running_loop().call_later(0.1, slow.answer.set_result, fine)
    assert await crew.pulses(1.0, 1.0) == {"slow": fine}
    assert crew.slowest_s >= 0.1
    while "hung" not in await crew.pulses(0.1, 1.0):
        assert crew.hands["hung"].silent_s < 3.0
    assert crew.hands["hung"].silent_s > 1.0 and crew.slowest_s < 0.1


async def test_who_has_not_had_time_is_not_silent() -> None:
    """On a machine that stood still, the leader's own absence proves nothing."""
    crew, hung = Crew("unit"), Asked()
    crew.hands["hung"] = Hand(
        hung, Started(Member("hung", "expert", "n", ""), None, "", ExchangeSettings())
    )
    for _ in range(10):
        assert await crew.pulses(0.01, 3) == {}
        assert crew.somebody_is_silent
        crew.hands["hung"].looked -= 1000
    async with asyncio.timeout(120):
        while await crew.pulses(0.01, 0.05) != {"hung": None}:
            pass


async def test_anothers_failure_costs_a_repetition(tiny_path: Path) -> None:
    """One rank's experts fail once, in a pass that has the other rank's rows as well, and once in
    a pass that has nothing but those."""
    async with unit(tiny_path, attention=2) as company:
        loader = company.ranks[0]._expert_loader
        assert loader is not None and loader._slots is not None
        compute, calls = loader._slots.compute, 0

        def failing(layer: int, x_RD: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += x_RD.shape[0] > 0
            if calls in (5, 40):
                calls += 1
                raise ValueError("once")
            return compute(layer, x_RD, *rest)

        loader._slots.compute = failing  # type: ignore[method-assign]
        async with dispatcher(company) as ranks:
            async with asyncio.timeout(120):
                while len(ranks._alive()) < 2:
                    await asyncio.sleep(0.01)
            short = replace(LONG.sampling, max_tokens=50)
            asked = [replace(LONG, id=f"r{i}", sampling=short) for i in range(6)]
            ends = await asyncio.gather(*(end_of(ranks, r) for r in asked))
        assert calls > 40 and set(ends) == {(FinishReason.LENGTH, None)}


async def test_a_request_that_breaks_passes_ends_alone(tiny_path: Path) -> None:
    """Its rows fail in one rank's experts. One such request lies there, one on the other rank; the
    others, of both ranks, get their tokens."""
    async with unit(tiny_path, attention=2) as company:
        loader = company.ranks[0]._expert_loader
        assert loader is not None and loader._slots is not None
        compute = loader._slots.compute

        def failing(layer: int, x_RW: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            if x_RW.view(torch.float32).isnan().any():
                raise ValueError("a row that cannot be computed")
            return compute(layer, x_RW, *rest)

        loader._slots.compute = failing  # type: ignore[method-assign]
        for rank in company.ranks:
            model = rank.engine.model._model.transformer  # type: ignore[attr-defined]
            model.embed_VD[1900] = torch.nan
        ended: list[str] = []
        async with dispatcher(company) as ranks:
            async with asyncio.timeout(120):
                while len(ranks._alive()) < 2:
                    await asyncio.sleep(0.01)

            async def ask(request: Request) -> tuple[FinishReason | None, str | None]:
                end = await end_of(ranks, request)
                ended.append(request.id)
                return end

            some = replace(LONG.sampling, max_tokens=120)
            asked = [replace(LONG, id=f"r{i}", sampling=some) for i in range(5)]
            poison = [replace(LONG, id=name, prompt_ids=(5, 1900, 6)) for name in ("p0", "p1")]
            ends = await asyncio.gather(*(ask(r) for r in [*poison, *asked]))
        for finish, error in ends[:2]:
            assert finish is FinishReason.ERROR and "a row that cannot be computed" in str(error)
        assert {*ended[:2]} == {"p0", "p1"}, "they do not last as long as there are others"
        assert set(ends[2:]) == {(FinishReason.LENGTH, None)}
        assert (await company.status()).deaths == 0


async def end_of(ranks: Dispatcher, request: Request) -> tuple[FinishReason | None, str | None]:
    end: tuple[FinishReason | None, str | None] = None, None
    async for delta in ranks.generate(request):
        end = delta.finish, delta.error
    return end


@pytest.mark.parametrize("attention", [1, 2])
async def test_a_rank_that_can_do_nothing_sleeps(tiny_path: Path, attention: int) -> None:
    """Until somebody tells that pages are free, or a grammar is there."""
    async with unit(tiny_path, attention=attention) as company:
        for rank in company.ranks:
            engine, loop = rank.engine, rank.server.engine_loop
            held: list[int] = []
            taken, compiling = threading.Event(), threading.Event()

            def take(engine: Engine, held: list[int] = held, taken: Any = taken) -> None:
                held += engine.pool.take(engine.pool.available)
                taken.set()

            loop._put(take)
            await asyncio.to_thread(taken.wait, 120)
            plans, plan = 0, engine._plan

            def counting(plan: Any = plan) -> Any:
                nonlocal plans
                plans += 1
                return plan()

            engine._plan = counting  # type: ignore[method-assign]
            request = replace(LONG, sampling=replace(LONG.sampling, max_tokens=3))
            loop.submit(0, 0, replace(request, id="waits"))
            assert engine._grammars is not None
            make = engine._grammars._make

            def late(*a: Any, make: Any = make, compiling: Any = compiling) -> Any:
                compiling.wait(120)
                return make(*a)

            engine._grammars._make = late  # type: ignore[method-assign]
            loop.submit(0, 1, replace(request, id="compiles", grammar='start: "a"'))
            async with asyncio.timeout(120):
                while not engine.busy:
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.3)
            assert engine.busy and plans < 10
            loop._put(lambda engine, held=held: engine.pool.release(held))
            compiling.set()
            async with asyncio.timeout(120):
                while engine.busy:
                    await asyncio.sleep(0.01)
