"""The Ray actors of a unit: an attention rank with its engine, and an expert rank.

Both take part in the unit's passes and follow its leader's plans; the leader talks to them through
the methods of `Seat` alone. An attention rank also serves the token channel.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import ray

from rayseek.cluster.config import ExchangeSettings
from rayseek.cluster.copies import CopyServer, Taken
from rayseek.cluster.dispatch import RankAddress
from rayseek.cluster.logs import start_logging
from rayseek.cluster.plan import Member, Pulse, Role, UnitPlan
from rayseek.cluster.precedence import take_precedence
from rayseek.cluster.rank_server import RankServer
from rayseek.cluster.spec import RankSpec
from rayseek.cluster.traces import start_tracing

if TYPE_CHECKING:  # torch: in these processes, not in the leader's
    from rayseek.cluster.build_unit import ExpertLoader
    from rayseek.cluster.participant import Broken, OnBroken, Participant
    from rayseek.model.expert_slots import ExpertSlots

log = logging.getLogger("rayseek.rank")

BOND_S = 3.0  # without a pulse, and without a group: its leader may be dead
ORPHAN_S = 8.0  # without a pulse, and in a group that does not move: they may be dead, or hang
END_S = 9.0  # for a group to end that has been given up: more than a sleeper takes (formed.py)
# Of the process, before it imports torch. NCCL's errors are ours (group.py): otherwise torch ends
# every process that waited for a dead one.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Started:
    """A process that is ready for a plan. `address`: of an attention rank's token channel.
    fingerprint: of what it computes with (model/fingerprint.py)."""

    member: Member
    address: RankAddress | None
    fingerprint: str
    exchange: ExchangeSettings


class Elsewhere(Exception):
    """A leader orders an expert rank that works for another unit."""


class Seat:
    """What the leader may ask of any process of its unit. Plain: tests run it without Ray."""

    role: Role

    def __init__(self, name: str, spec: RankSpec) -> None:
        os.environ.update(ENVIRONMENT)
        start_logging(name)
        start_tracing(name)
        self.name, self._spec = name, spec
        self._participant: Participant | None = None
        self._expert_loader: ExpertLoader | None = None
        self._loading = asyncio.Lock()  # one load at a time, also of plans that are given up
        self._prepared: tuple[UnitPlan, ExpertSlots | None] | None = None
        self._broken: Broken | None = None
        self._breaks = asyncio.Event()  # a new one after each
        self._copies: CopyServer | None = None
        self._fingerprint = ""

    async def start(self) -> Started:
        """Load what does not depend on a plan, and listen."""
        loop = asyncio.get_running_loop()

        def on_broken(broken: Broken) -> None:
            loop.call_soon_threadsafe(self._breaks_now, broken)

        host = self._spec.host or ray.util.get_node_ip_address()
        address = await loop.run_in_executor(None, self._load, host, on_broken)
        port = self._participant.store_port if self._participant else 0
        node = self._spec.node or ray.get_runtime_context().get_node_id()
        copies = ""
        if self._expert_loader is not None and (self.role == "expert" or not self._spec.dedicated):
            self._copies = CopyServer(self._expert_loader.copy)
            copies = f"{host}:{self._copies.start(host)}"
        member = Member(self.name, self.role, node, f"{host}:{port}", copies)
        return Started(member, address, self._fingerprint, self._spec.exchange)

    async def prepare(self, plan: UnitPlan, unit: str | None = None) -> None:
        """Load the expert slots that a plan of this unit gives us, beside those in use."""
        self._obey(unit)
        if self._participant is not None:
            self._participant.hear_of(plan)
        holder, slots = plan.holder_of(self.name), None
        if holder is not None:
            assert self._expert_loader is not None, "a holder can load experts"
            loop = asyncio.get_running_loop()
            async with self._loading:
                slots = await loop.run_in_executor(
                    None, self._expert_loader.load, plan.placement, holder, plan.sources,
                    plan.broken,
                )  # fmt: skip
        if self._prepared is None or plan.epoch > self._prepared[0].epoch:
            self._prepared = (plan, slots)

    async def commit(self, plan: UnitPlan) -> None:
        """Follow a plan that was prepared for, together with all others."""
        if self._participant is None or self._prepared is None or self._prepared[0] != plan:
            raise RuntimeError(f"{self.name} has not prepared for plan {plan.epoch}")
        if self._expert_loader is not None:
            self._expert_loader.use(self._prepared[1])
        self._participant.commit(plan, self._prepared[1])

    async def next_break(self, after: int) -> Broken:
        """Returns when the group of an epoch after this one broke; fails when the process dies.
        Both are for leaders, of which several may wait: the last is not told by the first."""
        while self._broken is None or self._broken.epoch <= after:
            await self._breaks.wait()
        return self._broken

    def _breaks_now(self, broken: Broken) -> None:
        self._broken = broken
        self._breaks.set()
        self._breaks = asyncio.Event()

    async def run_forever(self) -> None:
        """Never returns: its failure is how the owner of this process learns of its death."""
        await asyncio.Event().wait()

    async def pulse(self, unit: str | None = None) -> Pulse:
        """What this process is at; raises RuntimeError when it can not go on. unit: that asks."""
        raise NotImplementedError

    async def epoch(self) -> int:
        """Of the group that this process is in; -1: in none."""
        return self._participant.pulse.epoch if self._participant else 0

    def _obey(self, unit: str | None) -> None:
        """Raises Elsewhere if this unit has nothing to say here."""

    def stop(self) -> None:
        """End every thread. (A process that is killed needs none of this.)"""
        if self._copies is not None:
            self._copies.stop()

    @property
    def _taken(self) -> Taken | None:
        return self._expert_loader.taken if self._expert_loader is not None else None

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
        self._fingerprint = engine.fingerprint
        self._server = RankServer(
            engine, self._participant, self._spec.transfer, self._spec.streams
        )
        port = self._server.start(host)
        return RankAddress(self.name, f"{host}:{port}")

    def stop(self) -> None:
        super().stop()
        self._server.stop()

    async def retire(self) -> None:
        """Give every request back to its ingress, which continues it elsewhere, and take none."""
        self._server.retire()

    async def pulse(self, unit: str | None = None) -> Pulse:
        if not self._server.engine_loop.alive:
            raise RuntimeError("the engine's thread has died; this rank's log says of what")
        pulse = self._server.engine_loop.pulse
        counter = self._participant
        rows = counter.take_expert_rows() if counter else self._tally.take()
        transfers = self._server.engine_loop.transfers.counters.so_far
        return replace(pulse, expert_rows=rows, transfers=transfers, taken=self._taken)


class ExpertRank(Seat):
    """An expert rank: nothing but expert slots, for the tokens of the attention ranks.

    It works for one unit at a time and knows itself which: whatever leaders and replicas of
    `Experts` believe after a long stall, two units never share it.
    """

    role = "expert"

    def __init__(self, name: str, spec: RankSpec) -> None:
        super().__init__(name, spec)
        self._unit: str | None = None
        self._heard = 0.0  # from its leader; time.monotonic()

    async def works_for(self) -> str | None:
        """The unit that has it, as far as it knows. None: nobody, or one whose leader is silent
        and whose group is gone: then another may have it, unless its leader is only slow."""
        silent = time.monotonic() - self._heard > BOND_S and await self.epoch() < 0
        return None if silent else self._unit

    async def doubts(self) -> bool:
        """Whether its unit may be gone, and nobody left who would end the group: the leader is
        silent, and no pass comes or ends. So it is when the node of both hangs."""
        if self._participant is None or time.monotonic() - self._heard < ORPHAN_S:
            return False
        pulse = self._participant.pulse
        return pulse.epoch >= 0 and (pulse.idle or pulse.since_s > ORPHAN_S)

    async def part(self, unit: str) -> None:
        """This unit is gone: end its group, to be free. Raises RuntimeError if that fails."""
        if self._participant is None or unit != self._unit or not await self.doubts():
            return
        self._participant.end_groups()
        try:
            async with asyncio.timeout(END_S):
                while await self.epoch() >= 0:
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise RuntimeError(f"{self.name} cannot leave its group of {unit}") from None

    async def engage(self, unit: str) -> int:
        """Work for this unit. Returns the newest epoch known here: only later plans will be
        followed. Raises Elsewhere if another unit has it."""
        if await self.works_for() not in (None, unit):
            self._obey(unit)
        if unit != self._unit:
            self._prepared = None  # for another
        self._unit, self._heard = unit, time.monotonic()
        return self._participant.newest_epoch if self._participant else -1

    async def dismiss(self, unit: str) -> None:
        """This unit needs it no more."""
        if self._unit == unit:
            self._unit = None

    def _obey(self, unit: str | None) -> None:
        if unit is None:
            return
        if unit != self._unit:
            raise Elsewhere(f"{self.name} works for {self._unit or 'nobody'}, not for {unit}")
        self._heard = time.monotonic()

    def _load(self, host: str, on_broken: OnBroken) -> RankAddress | None:
        from rayseek.cluster.build_unit import build_expert_rank, fingerprint_of

        self._fingerprint = fingerprint_of(self._spec)
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
        super().stop()
        if self._participant is not None:
            self._participant.close()
            self._thread.join()

    async def pulse(self, unit: str | None = None) -> Pulse:
        self._obey(unit)
        if not self._thread.is_alive():
            raise RuntimeError("the experts' thread has died; this rank's log says of what")
        assert self._participant is not None
        pulse, rows = self._participant.pulse, self._participant.take_expert_rows()
        return replace(pulse, expert_rows=rows, taken=self._taken)
