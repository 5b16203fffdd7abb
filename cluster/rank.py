"""The Ray actors of a unit: an attention rank with its engine, and an expert rank.

Both take part in the unit's passes and follow its leader's plans; the leader talks to them through
the methods of `Seat` alone. An attention rank also serves the token channel.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import ray

from rayseek.cluster.dispatch import RankAddress
from rayseek.cluster.logs import start_logging
from rayseek.cluster.plan import Member, Pulse, Role, UnitPlan
from rayseek.cluster.precedence import take_precedence
from rayseek.cluster.rank_server import RankServer
from rayseek.cluster.spec import RankSpec

if TYPE_CHECKING:  # torch: in these processes, not in the leader's
    from rayseek.cluster.build_unit import ExpertLoader
    from rayseek.cluster.participant import Broken, OnBroken, Participant
    from rayseek.model.expert_slots import ExpertSlots

log = logging.getLogger("rayseek.rank")


@dataclass(frozen=True, slots=True)
class Started:
    """A process that is ready for a plan. `address`: of an attention rank's token channel."""

    member: Member
    address: RankAddress | None


class Seat:
    """What the leader may ask of any process of its unit. Plain: tests run it without Ray."""

    role: Role

    def __init__(self, name: str, spec: RankSpec) -> None:
        start_logging(name)
        self.name, self._spec = name, spec
        self._participant: Participant | None = None
        self._expert_loader: ExpertLoader | None = None
        self._loading = asyncio.Lock()  # one load at a time, also of plans that are given up
        self._prepared: tuple[UnitPlan, ExpertSlots | None] | None = None
        self._broken: asyncio.Queue[Broken] = asyncio.Queue()

    async def start(self) -> Started:
        """Load what does not depend on a plan, and listen."""
        loop = asyncio.get_running_loop()

        def on_broken(broken: Broken) -> None:
            loop.call_soon_threadsafe(self._broken.put_nowait, broken)

        host = self._spec.host or ray.util.get_node_ip_address()
        address = await loop.run_in_executor(None, self._load, host, on_broken)
        port = self._participant.store_port if self._participant else 0
        node = self._spec.node or ray.get_runtime_context().get_node_id()
        return Started(Member(self.name, self.role, node, f"{host}:{port}"), address)

    async def prepare(self, plan: UnitPlan) -> None:
        """Load the expert slots that a plan gives us, beside those in use."""
        holder, slots = plan.holder_of(self.name), None
        if holder is not None:
            assert self._expert_loader is not None, "a holder can load experts"
            loop = asyncio.get_running_loop()
            async with self._loading:
                slots = await loop.run_in_executor(
                    None, self._expert_loader.load, plan.placement, holder
                )
        if self._prepared is None or plan.epoch > self._prepared[0].epoch:
            self._prepared = (plan, slots)

    async def commit(self, plan: UnitPlan) -> None:
        """Follow a plan that was prepared for, together with all others."""
        if self._participant is None or self._prepared is None or self._prepared[0] != plan:
            raise RuntimeError(f"{self.name} has not prepared for plan {plan.epoch}")
        self._participant.commit(plan, self._prepared[1])

    async def next_break(self) -> Broken:
        """Returns when the group broke; fails when the process dies: both are for the leader."""
        return await self._broken.get()

    async def run_forever(self) -> None:
        """Never returns: its failure is how the owner of this process learns of its death."""
        await asyncio.Event().wait()

    async def pulse(self) -> Pulse:
        """What this process is at; raises RuntimeError when it can not go on."""
        raise NotImplementedError

    def stop(self) -> None:
        """End every thread. (A process that is killed needs none of this.)"""
        raise NotImplementedError

    def _load(self, host: str, on_broken: OnBroken) -> RankAddress | None:
        raise NotImplementedError


class Rank(Seat):
    """An attention rank: an engine with its KV pages, and its end of the token channel."""

    role = "attention"

    def _load(self, host: str, on_broken: OnBroken) -> RankAddress | None:
        from rayseek.cluster.build_unit import build_rank
        from rayseek.cluster.expert_tally import ExpertTally

        take_precedence()  # the kernels' threads inherit it
        self._tally = ExpertTally()  # of a lone rank
        engine, self._participant, self._expert_loader = build_rank(
            self.name, self._spec, host, on_broken, self._tally
        )
        self._server = RankServer(engine, self._participant, self._spec.transfer)
        port = self._server.start(host)
        return RankAddress(self.name, f"{host}:{port}")

    def stop(self) -> None:
        self._server.stop()

    async def pulse(self) -> Pulse:
        if not self._server.engine_loop.alive:
            raise RuntimeError("the engine's thread has died; this rank's log says of what")
        pulse = self._server.engine_loop.pulse
        counter = self._participant
        rows = counter.take_expert_rows() if counter else self._tally.take()
        transfers = self._server.engine_loop.transfers.counters.so_far
        return replace(pulse, expert_rows=rows, transfers=transfers)


class ExpertRank(Seat):
    """An expert rank: nothing but expert slots, for the tokens of the attention ranks."""

    role = "expert"

    def _load(self, host: str, on_broken: OnBroken) -> RankAddress | None:
        from rayseek.cluster.build_unit import build_expert_rank

        self._participant, self._expert_loader = build_expert_rank(
            self.name, self._spec, host, on_broken
        )
        self._thread = threading.Thread(target=self._run, name="experts", daemon=True)
        self._thread.start()
        return None

    def _run(self) -> None:
        from rayseek.cluster.participant import take_part_for_ever

        take_precedence()
        assert self._participant is not None
        take_part_for_ever(self._participant)

    def stop(self) -> None:
        if self._participant is not None:
            self._participant.close()
            self._thread.join()

    async def pulse(self) -> Pulse:
        if not self._thread.is_alive():
            raise RuntimeError("the experts' thread has died; this rank's log says of what")
        assert self._participant is not None
        return replace(self._participant.pulse, expert_rows=self._participant.take_expert_rows())
