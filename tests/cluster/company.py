"""A whole unit without Ray, for tests: leader, attention ranks and expert ranks, all in threads.

The leader is the real one; only the way from it to its processes is a call instead of Ray's.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import ray.exceptions

from rayseek.cluster.config import EngineSettings, ExchangeSettings, TransferSettings
from rayseek.cluster.dispatch import Dispatcher, RankAddress
from rayseek.cluster.engine import Engine
from rayseek.cluster.metrics import NoMeter
from rayseek.cluster.plan import Wanted
from rayseek.cluster.rank import ExpertRank, Rank, Seat, Started
from rayseek.cluster.rank_server import RankServer
from rayseek.cluster.request import Request, Token
from rayseek.cluster.spec import RankSpec, UnitSpec
from rayseek.cluster.speculation import Choice
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
        self.answers = asyncio.Event()  # not set: as after SIGSTOP
        self.answers.set()
        self._loading, self._loaded = threading.Lock(), False
        seat._load, self._load = self._loads, seat._load  # type: ignore[method-assign]

    def _loads(self, *arguments: Any) -> Any:
        with self._loading:
            if self.dead.is_set():
                raise ray.exceptions.ActorDiedError
            address = self._load(*arguments)
            self._loaded = True
            return address

    def __getattr__(self, name: str) -> Method:
        return Method(getattr(self.seat, name), self)

    async def call(self, method: Callable[..., Any], *arguments: Any) -> Any:
        async def carry_out() -> Any:
            await self.answers.wait()
            return await method(*arguments)

        answer = asyncio.ensure_future(carry_out())
        death = asyncio.ensure_future(self.dead.wait())
        try:
            await asyncio.wait([answer, death], return_when=asyncio.FIRST_COMPLETED)
            if self.dead.is_set():
                raise ray.exceptions.ActorDiedError
            return answer.result()
        finally:
            answer.cancel()
            death.cancel()

    async def die(self) -> None:
        """As a process does: everything closes, nobody is told but through the sockets."""
        if self.dead.is_set():
            return
        self.dead.set()

        def stop() -> None:
            with self._loading:  # what it is starting would outlive it
                if self._loaded:
                    self.seat.stop()

        await asyncio.get_running_loop().run_in_executor(None, stop)


class DraftingRank(Rank):
    """drafts: how many tokens every step drafts; None: as many as are measured to be best."""

    def __init__(self, name: str, spec: RankSpec, drafts: int | None) -> None:
        super().__init__(name, spec)
        self._drafts, self.has_started = drafts, False

    async def start(self) -> Started:
        started = await super().start()
        if self._drafts is not None:
            chosen = Choice(self._drafts)
            self.engine._depth_policy = lambda *_: chosen
        self.has_started = True
        return started

    @property
    def server(self) -> RankServer:
        return self._server

    @property
    def engine(self) -> Engine:
        return self._server.engine_loop._engine

    @property
    def transferred_pages(self) -> int:
        return self._server.engine_loop.transfers.counters.so_far.pages


class Company(Unit):
    """A unit whose processes are threads."""

    def __init__(self, spec: UnitSpec, drafts: int | None) -> None:
        super().__init__(spec, "unit", NoMeter())
        self.drafts = drafts
        self._hired = itertools.count()
        self.actors: dict[str, Direct] = {}
        self.killed: list[asyncio.Future[None]] = []

    def __del__(self) -> None:  # type: ignore[override]
        """Nobody awaits Python's own call of it."""

    def _spawn(self, index: int, name: str) -> Any:
        return self._made(DraftingRank(name, self._spec.rank, self.drafts))

    def _kill(self, actor: Direct) -> None:
        self.killed.append(asyncio.ensure_future(actor.die()))

    def _made(self, seat: Seat) -> Direct:
        actor = self.actors[seat.name] = Direct(seat)
        return actor

    async def hire(self) -> str:
        """Another expert rank comes and is taken in."""
        actor = self._made(ExpertRank(f"expert-{next(self._hired)}", self._spec.rank))
        started = await actor.seat.start()
        assert await self.attach("unit", actor, started)
        return actor.seat.name

    @property
    def ranks(self) -> list[DraftingRank]:
        """The attention ranks that live."""
        return [rank for rank in self.all_ranks if not self.actors[rank.name].dead.is_set()]

    @property
    def all_ranks(self) -> list[DraftingRank]:
        """Of those that have started, the dead included."""
        seats = [actor.seat for actor in self.actors.values()]
        return [s for s in seats if isinstance(s, DraftingRank) and s.has_started]

    async def kill(self, role: str, random: Random) -> None:
        alive = [a for a in self.actors.values() if a.seat.role == role and not a.dead.is_set()]
        await random.choice(alive).die()

    def bury(self) -> None:
        """Forget the dead, and with them what their processes would have freed."""
        self.actors = {name: a for name, a in self.actors.items() if not a.dead.is_set()}

    async def adopted(self, experts: int) -> bool:
        """Wait until a plan with so many expert ranks is followed by all."""
        async with asyncio.timeout(120):
            while (plan := self._plans.plan) is None or len(plan.holders) != experts:
                await asyncio.sleep(0.02)
            await self._plans.adopted(plan)
        return True

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._plans.following is not None:
            self._plans.following.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for actor in self.actors.values():
            await actor.die()
        await asyncio.gather(*self.killed)  # else the loop's end may cancel what has not begun
        for hand in self._company.hands.values():
            if hand.watch is not None:
                hand.watch.cancel()
            if hand.question is not None:
                hand.question.cancel()
        self.actors.clear()
        self._company.hands.clear()


@contextlib.asynccontextmanager
async def unit(
    path: Path, attention: int = 1, experts: int = 0, redundant: int = 0, spares: int = 0,
    settings: EngineSettings = SETTINGS, drafts: int | None = None, **exchange: Any,
) -> AsyncIterator[Company]:  # fmt: skip
    """The rest: as in the config's `exchange`. drafts: see DraftingRank."""
    config = ModelConfig.from_pretrained(path)
    wanted = Wanted(
        attention, experts, redundant, config.n_routed_experts, config.n_group,
        tuple(range(config.first_k_dense_replace, config.stored_layers)),
    )  # fmt: skip
    rank = RankSpec(
        str(path), settings, ExchangeSettings(**exchange),
        alone=attention == 1 and not experts, dedicated=experts > 0, host="127.0.0.1", node="n0",
        transfer=TransferSettings(min_prompt_tokens=64),
    )  # fmt: skip
    company = Company(UnitSpec("decode", wanted, rank, (0,) * attention, spares), drafts)
    try:
        for _ in range(experts + spares):
            await company.hire()
        async with asyncio.timeout(120):
            while not (await company.status()).ranks:
                await asyncio.sleep(0.02)
        yield company
    finally:
        await company.close()


def chosen(token: Token) -> object:
    """What the law of same tokens is about; how it was drafted is not."""
    return token.id, token.logprob, token.top


@contextlib.asynccontextmanager
async def dispatcher(company: Company, prefill: Company | None = None) -> AsyncIterator[Dispatcher]:
    """Of an ingress of this unit, and of one that computes prompts for it, if there is one."""

    async def discover() -> list[RankAddress]:
        ranks = list((await company.status()).ranks)
        sources = (await prefill.status()).ranks if prefill else ()
        return ranks + [replace(r, name=f"prefill-{r.name}", prefills=True) for r in sources]

    made = Dispatcher(discover, patience_s=120, refresh_s=0.05)
    try:
        async with asyncio.timeout(120):
            while prefill and made._source() is None:
                await asyncio.sleep(0.01)
        yield made
    finally:
        await made.close()


async def answer(to: Dispatcher, request: Request) -> list[object]:
    tokens: list[object] = []
    async for delta in to.generate(request):
        assert delta.error is None, delta
        tokens.extend(map(chosen, delta.tokens))
    return tokens


async def answers(
    company: Company, asked: Sequence[Request], prefill: Company | None = None
) -> Answers:
    """All at once."""
    async with dispatcher(company, prefill) as to, asyncio.timeout(120):
        found = await asyncio.gather(*(answer(to, request) for request in asked))
    return {request.id: tokens for request, tokens in zip(asked, found, strict=True)}


def in_engine(server: RankServer, look: Callable[[Engine], Any]) -> Any:
    """What `look` says in the engine's thread."""
    answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
    server.engine_loop._put(lambda engine: answer.put(look(engine)))
    return answer.get(timeout=120)


def is_idle(server: RankServer) -> bool:
    """Whether it runs nothing, and holds no page. Call it in a thread of its own."""
    transfers = server.engine_loop.transfers

    def look(engine: Engine) -> bool:
        engine.pool.check()
        return (
            not engine.busy
            and engine.load.waiting == 0
            and engine.pool.available == engine.pool.num_pages
            and not transfers.fetcher._fetches
            and not transfers.source._wanted
        )

    return bool(in_engine(server, look))
