"""A whole unit without Ray: leader, attention ranks and expert ranks, each with its threads.

The leader is the real one; only the way from it to its processes is a call instead of Ray's. What
comes out is compared with an engine that is alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import ray.exceptions

from rayseek.cluster.build import build_engine
from rayseek.cluster.config import EngineSettings, ExchangeSettings, TransferSettings
from rayseek.cluster.dispatch import Dispatcher
from rayseek.cluster.engine import run_to_end
from rayseek.cluster.metrics import NoMeter
from rayseek.cluster.plan import Wanted
from rayseek.cluster.rank import ExpertRank, Rank, Seat
from rayseek.cluster.request import Request, SamplingParams, Token
from rayseek.cluster.spec import RankSpec, UnitSpec
from rayseek.cluster.unit import Unit
from rayseek.model.config import ModelConfig

Answers = dict[str, list[object]]
SETTINGS = EngineSettings(
    cache_gib=0.02, max_context=512, max_batch=8, threads=1, step_timeout_s=5, chunk_tokens=48
)


class Method:
    def __init__(self, call: Callable[..., Any], actor: Direct) -> None:
        self._call, self._actor = call, actor

    def remote(self, *arguments: Any) -> asyncio.Task[Any]:
        return asyncio.ensure_future(self._actor.call(self._call, *arguments))


class Direct:
    """What an actor's handle does, in this process."""

    def __init__(self, seat: Seat) -> None:
        self.seat = seat
        self.dead = asyncio.Event()

    def __getattr__(self, name: str) -> Method:
        return Method(getattr(self.seat, name), self)

    async def call(self, method: Callable[..., Any], *arguments: Any) -> Any:
        answer = asyncio.ensure_future(method(*arguments))
        death = asyncio.ensure_future(self.dead.wait())
        await asyncio.wait([answer, death], return_when=asyncio.FIRST_COMPLETED)
        if self.dead.is_set():
            answer.cancel()
            raise ray.exceptions.ActorDiedError
        death.cancel()
        return answer.result()

    async def die(self) -> None:
        """As a process does: everything closes, nobody is told but through the sockets."""
        if self.dead.is_set():
            return
        self.dead.set()
        await asyncio.get_running_loop().run_in_executor(None, self.seat.stop)


class Company(Unit):
    """A unit whose processes are threads."""

    def __init__(self, spec: UnitSpec) -> None:
        super().__init__(spec, "unit", NoMeter())
        self.actors: dict[str, Direct] = {}
        self.killed: list[asyncio.Future[None]] = []

    def _spawn(self, index: int, name: str) -> Any:
        return self._made(Rank(name, self._spec.rank))

    def _kill(self, actor: Direct) -> None:
        self.killed.append(asyncio.ensure_future(actor.die()))

    def _made(self, seat: Seat) -> Direct:
        actor = self.actors[seat.name] = Direct(seat)
        return actor

    async def hire(self) -> str:
        """Another expert rank comes and is taken in."""
        actor = self._made(ExpertRank(f"expert-{len(self.actors)}", self._spec.rank))
        started = await actor.seat.start()
        assert await self.attach("unit", actor, started)
        return actor.seat.name

    async def kill(self, role: str, random: Random) -> None:
        alive = [a for a in self.actors.values() if a.seat.role == role and not a.dead.is_set()]
        await random.choice(alive).die()

    async def adopted(self, experts: int) -> bool:
        """Wait until a plan with so many expert ranks is followed by all."""
        async with asyncio.timeout(20):
            while self._plan is None or len(self._plan.holders) != experts:
                await asyncio.sleep(0.02)
            await self._adopted(self._plan)
        return True

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for actor in self.actors.values():
            await actor.die()
        await asyncio.gather(*self.killed)  # else the loop's end may cancel what has not begun
        for hand in self._company.hands.values():
            if hand.watch is not None:
                hand.watch.cancel()
        self.actors.clear()
        self._company.hands.clear()


@contextlib.asynccontextmanager
async def unit(
    path: Path, attention: int = 1, experts: int = 0, redundant: int = 0, spares: int = 0,
    **exchange: Any,
) -> AsyncIterator[Company]:  # fmt: skip
    config = ModelConfig.from_pretrained(path)
    wanted = Wanted(
        attention, experts, redundant, config.n_routed_experts, config.n_group,
        tuple(range(config.first_k_dense_replace, config.stored_layers)),
    )  # fmt: skip
    rank = RankSpec(
        "unit", str(path), SETTINGS, ExchangeSettings(**exchange),
        alone=attention == 1 and not experts, dedicated=experts > 0, host="127.0.0.1", node="n0",
        transfer=TransferSettings(min_prompt_tokens=64),
    )  # fmt: skip
    company = Company(UnitSpec("decode", wanted, rank, (0,) * attention, spares))
    try:
        for _ in range(experts + spares):
            await company.hire()
        async with asyncio.timeout(30):
            while not (await company.status()).ranks:
                await asyncio.sleep(0.02)
        yield company
    finally:
        await company.close()


def chosen(token: Token) -> object:
    """What the law is about; how it was drafted is not."""
    return token.id, token.logprob, token.top


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


async def answers(
    company: Company, asked: list[Request], prefill: Company | None = None
) -> Answers:
    async def discover() -> Any:
        ranks = list((await company.status()).ranks)
        sources = (await prefill.status()).ranks if prefill else ()
        return ranks + [replace(r, name=f"prefill-{r.name}", prefills=True) for r in sources]

    dispatcher = Dispatcher(discover, patience_s=30, refresh_s=0.05)
    found: Answers = {}

    async def one(request: Request) -> None:
        tokens = found[request.id] = []
        async for delta in dispatcher.generate(request):
            assert delta.error is None, delta
            tokens.extend(map(chosen, delta.tokens))

    try:
        async with asyncio.timeout(60):
            while prefill and dispatcher._source() is None:
                await asyncio.sleep(0.01)
            await asyncio.gather(*(one(request) for request in asked))
    finally:
        await dispatcher.close()
    return found


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


LAYOUTS: list[dict[str, Any]] = [
    {"attention": 2},
    {"attention": 4, "redundant": 8},
    {"experts": 1},
    {"experts": 2, "micro_batches": 2},
    {"experts": 3, "redundant": 3, "mode": "exact"},
    {"attention": 2, "experts": 5, "mode": "fixed"},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
async def test_the_tokens_do_not_depend_on_the_layout(
    tiny_path: Path, undisturbed: Answers, layout: dict[str, Any]
) -> None:
    async with unit(tiny_path, **layout) as company:
        found = await answers(company, requests(16))
    assert found == {request.id: undisturbed[request.id] for request in requests(16)}


async def test_expert_ranks_come_and_go_under_load(tiny_path: Path, undisturbed: Answers) -> None:
    """2 -> 5 -> 3: nothing fails, nothing differs, and all of them take part in between."""
    async with unit(tiny_path, experts=2, spares=3) as company:
        asked = asyncio.ensure_future(answers(company, requests(40)))
        company._wanted = replace(company._wanted, experts=5)
        await company.adopted(experts=5)
        for name in list((await company.status()).expert_ranks)[:2]:
            await company.detach(name)
        assert await company.adopted(experts=3)
        assert await asked == undisturbed


async def test_a_rebalance_in_mid_stream_changes_no_token(
    tiny_path: Path, undisturbed: Answers
) -> None:
    async with unit(tiny_path, experts=2, redundant=2) as company:
        before = company._plan
        assert before is not None
        asked = asyncio.ensure_future(answers(company, requests(40)))
        await asyncio.sleep(0.3)
        for layer in before.placement.slots:
            company._load._rows[layer][:] = range(8)
        await company.rebalance()
        assert await asked == undisturbed
        after = company._plan
        assert after is not None and after.placement.version > before.placement.version
        assert after.placement.slots != before.placement.slots


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

    async with asyncio.timeout(20):  # gRPC frees a server some time after it has stopped
        while at_work() or open_files() > before + 8:
            await asyncio.sleep(0.1)
