"""A whole unit without Ray (company.py), and what comes out against an engine that is alone."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from torch._C._distributed_c10d import TCPStore

from rayseek.cluster.build import build_engine
from rayseek.cluster.engine import run_to_end
from rayseek.cluster.rank import Rank
from rayseek.cluster.request import Request, SamplingParams
from tests.cluster.company import SETTINGS, Answers, answers, chosen, unit


def requests(count: int, seed: int = 0) -> list[Request]:
    random = Random(seed)
    made = []
    for i in range(count):
        ids = tuple(random.randrange(3, 1500) for _ in range(random.choice([3, 20, 70, 150])))
        params = SamplingParams(
            max_tokens=random.randrange(10, 40),
            temperature=random.choice([0.0, 0.7, 1.3]),
            frequency_penalty=random.choice([0.0, 0.5]),
            seed=i,
            logprobs=random.choice([None, 2]),
        )
        made.append(Request(f"r{i}", ids, params))
    return made


@pytest.fixture(scope="module")
def undisturbed(tiny_path: Path) -> Answers:
    engine = build_engine(tiny_path, SETTINGS)
    found: Answers = {}
    for request in requests(40):
        found[request.id] = []
        engine.submit(request)
    run_to_end(engine, lambda d: found[d.request_id].extend(map(chosen, d.tokens)))
    return found


async def test_pages_from_a_prefill_unit_give_the_same_tokens(
    tiny_path: Path, undisturbed: Answers
) -> None:
    """As in `laptop-split`: a prefill rank with experts, a decode rank with two expert ranks."""
    async with unit(tiny_path) as prefill, unit(tiny_path, experts=2) as decode:
        assert await answers(decode, requests(40), prefill) == undisturbed
        (rank,) = (a.seat for a in decode.actors.values() if isinstance(a.seat, Rank))
        transfers = (await rank.pulse()).transfers
        assert transfers is not None and transfers.fetched and not transfers.fallbacks


async def test_expert_ranks_come_and_go_under_load(tiny_path: Path, undisturbed: Answers) -> None:
    """2 -> 5 -> 3: nothing fails, nothing differs, and all of them take part in between."""
    async with unit(tiny_path, experts=2, spares=3) as company:
        asked = asyncio.ensure_future(answers(company, requests(40)))
        company._plans.wanted = replace(company._plans.wanted, experts=5)
        await company.adopted(experts=5)
        for name in list((await company.status()).expert_ranks)[:2]:
            await company.detach(name)
        assert await company.adopted(experts=3)
        assert await asked == undisturbed


async def test_a_rebalance_in_mid_stream_changes_no_token(
    tiny_path: Path, undisturbed: Answers
) -> None:
    async with unit(tiny_path, experts=2, redundant=2) as company:
        before = company._plans.plan
        assert before is not None
        asked = asyncio.ensure_future(answers(company, requests(40)))
        await asyncio.sleep(0.3)
        for layer in before.placement.slots:
            company._load._rows[layer][:] = range(8)
        await company.rebalance()
        assert await asked == undisturbed
        after = company._plans.plan
        assert after is not None and after.placement.version > before.placement.version
        assert after.placement.slots != before.placement.slots


def epochs(store: TCPStore) -> set[str]:
    """Of addresses; a bell may still be rung for a group that has just ended."""
    keys = [key.split("/") for key in store.list_keys()]
    return {epoch for _, epoch, *rest in keys if len(rest) == 2}


async def test_the_store_forgets_earlier_epochs(tiny_path: Path) -> None:
    """Members of each group leave their addresses there: kilobytes each, where there are many."""
    async with unit(tiny_path, experts=2, redundant=2) as company:
        (rank,) = company.ranks
        assert rank._participant is not None
        store = TCPStore("127.0.0.1", rank._participant.store_port, is_master=False)
        for _ in range(3):
            before = company._plans.plan
            await company.rebalance()
            async with asyncio.timeout(120):
                while (plan := company._plans.plan) is before or plan is None:
                    await asyncio.sleep(0.01)
            await company._plans.adopted(plan)
            async with asyncio.timeout(120):
                while epochs(store) != {f"e{plan.epoch}"}:
                    await asyncio.sleep(0.01)


@pytest.mark.parametrize("layout", [{"experts": 2}, {"experts": 3, "redundant": 16}], ids=str)
async def test_deaths_of_expert_ranks_cost_a_pause_and_nothing_else(
    tiny_path: Path, undisturbed: Answers, layout: dict[str, Any]
) -> None:
    random = Random(1)
    async with unit(tiny_path, **layout) as company:
        asked = asyncio.ensure_future(answers(company, requests(40)))
        for _ in range(3):
            await asyncio.sleep(0.2)
            await company.kill("expert", random)
            await company.hire()
        assert await asked == undisturbed
        async with asyncio.timeout(120):
            while (await company.status()).deaths < 3:
                await asyncio.sleep(0.02)
        assert (await company.status()).deaths == 3


async def test_a_dead_attention_rank_is_replaced_and_its_requests_move(
    tiny_path: Path, undisturbed: Answers
) -> None:
    async with unit(tiny_path, attention=2, experts=1) as company:
        asked = asyncio.ensure_future(answers(company, requests(40)))
        await asyncio.sleep(0.2)
        await company.kill("attention", Random(2))
        assert await asked == undisturbed


async def test_nothing_is_left_behind(tiny_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Threads and open files are as many as before, after joins, deaths and plans."""

    def open_files() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    async def one_life(seed: int) -> None:
        async with unit(tiny_path, experts=2) as company:
            asked = asyncio.ensure_future(answers(company, requests(6)))
            await company.kill("expert", Random(seed))
            await company.hire()
            await asked

    await one_life(0)
    before = open_files()
    for seed in range(3):
        await one_life(seed)

    def at_work() -> set[str]:
        return {"engine", "experts"} & {thread.name for thread in threading.enumerate()}

    async with asyncio.timeout(120):  # gRPC frees a server some time after it has stopped
        while at_work() or open_files() > before + 8:
            await asyncio.sleep(0.1)
