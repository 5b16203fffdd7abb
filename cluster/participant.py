"""One process's part in the steps of its unit: agreement, passes, new plans.

A pass is one run through the layers whose experts are spread over the unit. Every pass begins
with a vote: who has rows, of which kind, and who knows of a newer plan. Those without rows take
part with none. When an exchange breaks, because somebody died or left, the group is dropped, the
next plan is awaited, and the pass runs again: it writes the same cache slots, so nobody notices
but the clock.

A pass may also fail by an error of a member's own computation, which may be due to anybody's rows.
That member says so in the group's store and leaves. Each member with rows in the pass then runs
its own alone: who fails again knows that it has the cause on board, and the others lose a pass.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeVar

import torch
from torch._C._distributed_c10d import TCPStore

from rayseek.cluster.agreement import (
    Agreement,
    Closed,
    Kind,
    PassFailed,
    Unfit,
    Vote,
    agree,
)
from rayseek.cluster.exchange import Exchange, Mode, RemoteExperts
from rayseek.cluster.formed import Formed, Line
from rayseek.cluster.group import ExchangeBroken, open_store
from rayseek.cluster.plan import Exchanged, ExpertRows, Pulse, UnitPlan
from rayseek.kernels.ops import SplitOps
from rayseek.kernels.select import Device
from rayseek.model.config import ModelConfig
from rayseek.model.expert_slots import ExpertsReleased

if TYPE_CHECKING:
    from rayseek.cluster.config import ExchangeSettings
    from rayseek.model.expert_slots import ExpertSlots

log = logging.getLogger("rayseek.participant")

AGREEMENT = "agreement"
CONNECT = timedelta(seconds=3)
FEW_ROWS, FEW_COPIES = 32, 256  # of a member in a pass: its rows; and one for each holder
MOST_FAILURES = 12  # in a row; finding one request that fails takes four of them
GROUP_ENDS = (ExchangeBroken, ExpertsReleased)  # the leader knew of the end before we did
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Broken:
    """For the leader: the group of this epoch is of no use any more."""

    epoch: int
    reason: str


OnBroken: TypeAlias = Callable[[Broken], None]


class Participant:
    """Owned by the thread that computes; the methods under "for other threads" are for others.

    host: where the others find the key-value store that this member offers. device: of `ops`, and
    so of the groups. timeout_s: how long an exchange may stand still. on_broken: told of every
    group that had to be given up.
    """

    def __init__(
        self,
        name: str,
        host: str,
        config: ModelConfig,
        ops: SplitOps,
        device: Device,
        settings: ExchangeSettings,
        timeout_s: float,
        on_broken: OnBroken,
    ) -> None:
        self.name, self.host, self.config = name, host, config
        self.ops, self.device = ops, device
        self.settings, self.timeout_s = settings, timeout_s
        self._store = open_store(host)
        self._on_broken = on_broken
        main = config.num_hidden_layers
        self._layers = {
            Kind.FORWARD: range(config.first_k_dense_replace, main),
            Kind.DRAFT: range(main, config.stored_layers),
        }
        self.micro_batches = 1  # of the pass that is running
        self._changed = threading.Condition()
        self._newest: tuple[UnitPlan, ExpertSlots | None] | None = None
        self._closed = False
        self._useless_epoch = -1  # plans up to here have been given up
        self._broken_before = -1  # so are the groups of epochs below, though we may not know why
        self._formed: Formed | None = None
        self._connected: tuple[str, Line, TCPStore] | None = None
        self._passes = self._failures = 0
        self._exchanged = Exchanged(0, {})  # in the epochs before
        self._where, self._since = "start", time.monotonic()

    @property
    def store_port(self) -> int:
        return int(self._store.port)

    def experts(self, prefix: str) -> RemoteExperts:
        """The experts of the layer `prefix` ("model.layers.3"), wherever a pass finds them."""
        return RemoteExperts(self._exchange, int(prefix.rpartition(".")[2]))

    def _exchange(self) -> Exchange:
        assert self._formed is not None, "experts are reached within a pass only"
        return self._formed.exchange

    # ---- for other threads ----

    def hear_of(self, plan: UnitPlan) -> None:
        """A plan is to be prepared. On a GPU, kernels that wait for a dead member hold up whoever
        frees memory there, as loading experts may: they end now, not when it is committed."""
        if plan.broken and self.device == "cuda":
            self._broken_before = max(self._broken_before, plan.epoch)

    def commit(self, plan: UnitPlan, slots: ExpertSlots | None) -> None:
        """Follow this plan from the next pass on that everybody can. `slots`: its experts."""
        with self._changed:
            if self._newest is None or plan.epoch > self._newest[0].epoch:
                self._newest = (plan, slots)
                if plan.broken:
                    self._broken_before = max(self._broken_before, plan.epoch)
            self._changed.notify_all()
        self.ring()

    def end_groups(self) -> None:
        """The unit of all plans so far is gone, and nobody in it will end its group."""
        self._broken_before = max(self._broken_before, self.newest_epoch + 1)

    def ring(self) -> None:
        """There is something to do: wake all members if they sleep."""
        with self._changed:
            self._changed.notify_all()
        formed = self._formed
        if formed is not None and formed.asleep:
            formed.ring()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.ring()

    @property
    def newest_epoch(self) -> int:
        """Of the plans that were committed; -1: there was none."""
        newest = self._newest
        return newest[0].epoch if newest else -1

    @property
    def pulse(self) -> Pulse:
        formed, since = self._formed, self._since
        where, waits = self._where, self._where == AGREEMENT
        position = formed.exchange.position if formed else None
        if position is not None and position.since > since:
            since, waits = position.since, position.waits
            where = f"{where}, layer {position.layer}, {position.stage or 'computing'}"
        return Pulse(
            epoch=formed.plan.epoch if formed else -1,
            passes=self._passes,
            where=where,
            waits=waits,
            idle=formed is None or formed.asleep,
            since_s=time.monotonic() - since,
            exchanged=self._total(formed),
        )

    def take_expert_rows(self) -> ExpertRows | None:
        """Rows that our slots got since the last call."""
        formed = self._formed
        if formed is None or formed.exchange.holding is None:
            return None
        return ExpertRows(formed.plan.placement.version, formed.exchange.take_slot_rows())

    # ---- for the computing thread ----

    def run(self, kind: Kind, rows: int, work: Callable[[], Result]) -> Result:
        """Run a pass of our own: `work` computes it, reaching experts through `exchange`.

        Takes part in the others' passes until ours is agreed on. `work` runs again from its start
        if the group breaks meanwhile, or the pass fails while it has others' rows as well. Raises
        what `work` raises, PassFailed, Closed, and Unfit.
        """
        alone = ours = only = False
        while True:
            formed, ours = None, False
            try:
                formed = self._group()
                agreement = self._agreement(formed, kind, rows, alone)
                ours, only = agreement.takes(formed.rank, kind), agreement.only(formed.rank)
                if ours:
                    self._start_pass(formed, agreement)
                    result = work()
                    self._failures = 0
                    return result
                self._follow(formed, agreement)
            except GROUP_ENDS as broken:
                failure = formed.failure() if formed and ours else None
                self._drop(broken)
                if failure and only:
                    raise PassFailed(failure) from None
                alone = alone or failure is not None
            except Exception as error:
                self._fail(formed, error)
                if ours and only:
                    raise
                alone = alone or ours
            finally:
                self._at("between passes")

    @torch.inference_mode()
    def idle(self, has_work: Callable[[], bool]) -> None:
        """Nothing to do here: take part in one pass of the others, or sleep until a bell.

        Raises Closed, and Unfit.
        """
        formed = None
        try:
            formed = self._group()
            agreement = self._agreement(formed, Kind.NOTHING, 0)
            if agreement.kind == Kind.NOTHING and not agreement.adopt:
                self._sleep(formed, has_work)
            else:
                self._follow(formed, agreement)
        except GROUP_ENDS as broken:
            self._drop(broken)
        except Exception as error:
            self._fail(formed, error)
        finally:
            self._at("between passes")

    def leave(self, together: bool = False) -> None:
        """Leave the group, which ends it for everybody. together: all have agreed to."""
        formed, self._formed = self._formed, None
        if formed is not None:
            self._exchanged = self._total(formed)
            formed.group.close(flush=together)

    def connections(self, store: str) -> tuple[Line, TCPStore]:
        """Two to the store at this host:port; kept, for connecting can take long."""
        if self._connected is None or self._connected[0] != store or self._connected[1].stuck:
            self._connected = (store, Line(self._connect(store)), self._connect(store))
        return self._connected[1:]

    def _connect(self, store: str) -> TCPStore:
        """In short tries, for it may have died, and a newer plan may know."""
        host, port = _address(store)
        deadline = time.monotonic() + self.timeout_s
        while True:
            try:
                client = TCPStore(host, port, is_master=False, timeout=CONNECT)
                client.set_timeout(timedelta(seconds=self.timeout_s))
                return client
            except RuntimeError as error:
                if self.has_news() or time.monotonic() > deadline:
                    raise ExchangeBroken(f"no connection to the store at {store}") from error

    def is_over(self, epoch: int) -> bool:
        """Whether a newer plan says that nobody computes in the group of this epoch any more."""
        return epoch < self._broken_before

    def has_news(self) -> bool:
        """A newer plan than the one that is being formed, or the order to close."""
        return self._closed or self._plan() is not None

    # ---- inside ----

    def _total(self, formed: Formed | None) -> Exchanged:
        """Of the epochs before, and the one of `formed`."""
        if formed is None:
            return self._exchanged
        seconds = dict(self._exchanged.seconds)
        for stage, spent in dict(formed.exchange.seconds).items():
            if stage:  # not the model between two exchanges
                seconds[stage] = seconds.get(stage, 0.0) + spent
        return Exchanged(self._exchanged.bytes + formed.exchange.bytes_sent, seconds)

    def _at(self, where: str) -> None:
        self._where, self._since = where, time.monotonic()

    def _agreement(self, formed: Formed, kind: Kind, rows: int, alone: bool = False) -> Agreement:
        self._at(AGREEMENT)
        newest = self._newest
        assert newest is not None
        votes = formed.group.all_gather((kind, rows, newest[0].epoch, alone))
        agreement = agree([Vote(Kind(k), r, e, bool(a)) for k, r, e, a in votes], formed.plan.epoch)
        self._at(f"{agreement.kind.name.lower()} pass {self._passes}")
        return agreement

    def _follow(self, formed: Formed, agreement: Agreement) -> None:
        """Take part in a pass without rows of our own, or adopt the plan that everybody has."""
        if agreement.adopt:
            self.leave(together=True)
            return
        parts = self._start_pass(formed, agreement)
        formed.exchange.idle(self._layers[agreement.kind], parts)
        self._failures = 0

    def _start_pass(self, formed: Formed, agreement: Agreement) -> int:
        """Returns in how many micro-batches it runs."""
        self._passes += 1
        rows, exchange = agreement.rows, formed.exchange
        exchange.mode = mode_of_pass(self.settings.mode, max(rows), len(formed.plan.holders))
        split = agreement.kind == Kind.FORWARD and max(rows) > 1
        self.micro_batches = self.settings.micro_batches if split else 1
        exchange.start_pass(self._passes, rows, self.micro_batches)
        return self.micro_batches

    def _sleep(self, formed: Formed, has_work: Callable[[], bool]) -> None:
        formed.asleep = True
        try:
            epoch = formed.plan.epoch
            while not (has_work() or self._closed or self._has_newer(epoch)):
                if self.is_over(epoch):
                    raise ExchangeBroken("its unit is gone")
                if formed.wait_for_bell():
                    break
            else:
                formed.ring()  # what we know of, the others must wake for
        finally:
            formed.asleep = False
            formed.nap += 1

    def _has_newer(self, epoch: int) -> bool:
        return self._newest is not None and self._newest[0].epoch > epoch

    def _group(self) -> Formed:
        """The group of the newest plan that is any good; waits for one."""
        while self._formed is None:
            self._at("waiting for a plan")
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._plan() is not None)
                plan_and_slots = self._plan()
            if self._closed:
                raise Closed
            assert plan_and_slots is not None
            plan, slots = plan_and_slots
            rank = plan.rank_of(self.name)
            self._useless_epoch = plan.epoch  # whatever becomes of it, it is not formed twice
            if rank is not None:  # else we are a spare, or one that is to leave
                self._at(f"forming the group of epoch {plan.epoch}")
                try:
                    self._formed = Formed(self, plan, rank, slots)
                except ExchangeBroken:
                    self._connected = None  # they may be what does not work
                    raise
                self._forget_before(plan.epoch)
        if self._closed:
            raise Closed
        return self._formed

    def _forget_before(self, epoch: int) -> None:
        """What earlier groups have left in our store, addresses above all. Their members are in
        this one now, or in none. Keys of later epochs may be there already."""
        ours = f"{self.name}/e"  # as Formed calls them
        for key in self._store.list_keys():
            if key.startswith(ours) and int(key.removeprefix(ours).partition("/")[0]) < epoch:
                self._store.delete_key(key)

    def _plan(self) -> tuple[UnitPlan, ExpertSlots | None] | None:
        """The newest one, if it has not been tried yet."""
        newest = self._newest
        return newest if newest is not None and newest[0].epoch > self._useless_epoch else None

    def _drop(self, broken: RuntimeError) -> None:
        """Leave the group, which ends it for everybody, and tell the leader."""
        log.warning("%s: epoch %d ends: %s", self.name, self._useless_epoch, str(broken))
        self._on_broken(Broken(self._useless_epoch, str(broken)))
        self.leave()

    def _fail(self, formed: Formed | None, error: Exception) -> None:
        """An error of our own in a pass: say so, and leave. The others are in the middle of the
        pass, and only a new group gets us out of step."""
        log.error("%s failed in %s", self.name, self._where, exc_info=error)
        # Its frames hold started exchanges, and so the group's sockets.
        traceback.clear_frames(error.__traceback__)
        if formed is not None:
            formed.tell_failure(f"{self.name}: {error!r}")
        self._drop(ExchangeBroken(f"{self.name} failed in a pass: {error!r}"))
        self._failures += 1
        if self._failures >= MOST_FAILURES:
            raise Unfit(f"{self.name} failed in {self._failures} passes in a row")


def take_part_for_ever(participant: Participant) -> None:
    """The life of an expert rank's thread."""
    try:
        with contextlib.suppress(Closed), torch.inference_mode():
            while True:
                participant.idle(lambda: False)
    finally:
        participant.leave()


def mode_of_pass(setting: Mode | Literal["auto"], most_rows: int, holders: int) -> Mode:
    """auto: a few rows to everybody cost less than asking how many are wanted where."""
    if setting != "auto":
        return setting
    few = most_rows <= FEW_ROWS and most_rows * holders <= FEW_COPIES
    return "fixed" if few else "exact"


def _address(target: str) -> tuple[str, int]:
    host, _, port = target.rpartition(":")
    return host, int(port)
