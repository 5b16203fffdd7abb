"""A formed group of a unit, the exchange through it, and the bell that wakes its members.

Members meet at the key-value store of the first one. Its host may vanish or hang: torch then waits
for ever for most answers of a store, whatever limits it was given.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from torch._C._distributed_c10d import TCPStore
from torch.distributed import DistStoreError

from rayseek.cluster.exchange import Exchange
from rayseek.cluster.group import ExchangeBroken, Group

if TYPE_CHECKING:
    from rayseek.cluster.participant import Participant
    from rayseek.cluster.plan import UnitPlan
    from rayseek.model.expert_slots import ExpertSlots

BELL_S = 5.0  # a sleeper looks up so often, should a bell be lost
STORE_S = 3.0  # for a store to answer
Answer = TypeVar("Answer")


class Line:
    """A connection to a store, for calls that would never return if its host hung. They are made
    in a thread of the line's own, which is left behind then. stuck: it was."""

    def __init__(self, store: TCPStore) -> None:
        self.store, self.stuck = store, False
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=_make, args=(self._calls,), name="store", daemon=True).start()
        weakref.finalize(self, self._calls.put, None)

    def ask(self, call: Callable[[TCPStore], Answer], limit_s: float = STORE_S) -> Answer:
        """What `call` returns or raises; ExchangeBroken if it does neither in time."""
        answer: Future[Answer] = Future()
        store = self.store

        def make() -> None:
            try:
                answer.set_result(call(store))
            except Exception as error:
                answer.set_exception(error)

        self._calls.put(make)
        try:
            return answer.result(limit_s)
        except TimeoutError:
            self.stuck = True
            raise ExchangeBroken(f"the store does not answer within {limit_s:.0f} s") from None


def _make(calls: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (call := calls.get()) is not None:
        call()
        del call  # it holds the connection


class Formed:
    """A formed group, with what belongs to it."""

    def __init__(
        self, me: Participant, plan: UnitPlan, rank: int, slots: ExpertSlots | None
    ) -> None:
        self.plan, self.rank = plan, rank
        self._keys = f"{plan.members[0].name}/e{plan.epoch}"
        # Two connections: one sleeps on the bell while the other rings it.
        self._line, self._ringer = me.connections(plan.members[0].store)
        nodes = sorted({m.node for m in plan.members})
        self.group = Group(
            self._line.store, self._keys, rank, len(plan.members), me.timeout_s, me.device,
            given_up=me.has_news, over=lambda: me.is_over(plan.epoch), address=me.host,
        )  # fmt: skip
        self.exchange = Exchange(
            self.group, plan.placement, plan.holders, [nodes.index(m.node) for m in plan.members],
            slots, me.ops, me.config.hidden_size, me.config.num_experts_per_tok,
            hierarchical=len(nodes) > 1,
        )  # fmt: skip
        self._ringing = threading.Lock()
        self._rung = -1
        self.asleep = False
        self.nap = 0  # counts the sleeps of the epoch: all members agree on it

    def ring(self) -> None:
        with self._ringing, contextlib.suppress(RuntimeError):  # its host died: so did the group
            if self._rung < self.nap:
                self._rung = self.nap
                self._ringer.set(f"{self._keys}/{self.nap}", "1")

    def wait_for_bell(self) -> bool:
        """Whether it rang within BELL_S. Raises ExchangeBroken if its host is gone, or hangs."""
        bell = [f"{self._keys}/{self.nap}"]
        try:
            self._line.ask(lambda s: s.wait(bell, timedelta(seconds=BELL_S)), BELL_S + STORE_S)
            if self.nap >= 2:  # everybody has woken from it: they agreed since
                self._line.ask(lambda s: s.delete_key(f"{self._keys}/{self.nap - 2}"))
        except DistStoreError:
            return False
        except RuntimeError as error:
            raise ExchangeBroken(f"the store of {self.plan.members[0].name} is gone") from error
        return True

    def tell_failure(self, what: str) -> None:
        """To the others, before this member leaves because of an error of its own."""
        with contextlib.suppress(RuntimeError):
            self._line.ask(lambda s: s.set(f"{self._keys}/failed", what))

    def failure(self) -> str | None:
        """What a member told that left so; None: it died, or was ended."""
        key = f"{self._keys}/failed"
        with contextlib.suppress(RuntimeError):  # its host died
            if self._line.ask(lambda s: s.check([key])):
                return bytes(self._line.ask(lambda s: s.get(key))).decode()
        return None
