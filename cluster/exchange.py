"""Rows to the experts of other members and their products back, layer by layer, for one epoch.

`begin` sends rows to where their experts are, `Pending.compute` runs what has arrived here and
sends the products home, `Pending.add` sums them at home in the order of the experts. Work of
several micro-batches can be under way between those three. All members make the same calls in the
same order; those without rows take part with none (`idle`). A result does not depend on who holds
an expert (kernels/ops.py: SplitOps).

Modes differ in how a member learns how much comes. exact: counts travel first, then just the rows
that are needed; for prompts. fixed: every holder gets all rows, whose numbers were agreed on for
the pass; one exchange less, for decoding. static: fixed, and products come in fixed places as well,
so that no shape depends on data and the host reads nothing: what a CUDA graph needs.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayseek.cluster.group import Group, Transfer
from rayseek.cluster.placement import ExpertPlacement, Home
from rayseek.cluster.routes import Hop, make_hops
from rayseek.cluster.wire_rows import WireRows
from rayseek.kernels.native import NativeOps
from rayseek.kernels.ops import SplitOps
from rayseek.kernels.row_places import NativePlaces, Room, Route, RowPlaces, TorchPlaces
from rayseek.model.micro_batches import part_sizes

Mode = Literal["exact", "fixed", "static"]
WAITS = ("counts", "dispatch", "return")  # the stages in which a member stands still for others


class Holding(Protocol):
    """The experts in this member's slots."""

    def compute(self, layer: int, x_RW: Tensor, row_N: Tensor, slot_N: Tensor) -> Tensor:
        """`SplitOps.expert_rows` with the experts of the layer, by local slot."""


class Position(NamedTuple):
    """Where a member is: the stage "" is the model between two exchanges. since: monotonic."""

    number: int
    layer: int
    stage: str
    since: float

    @property
    def waits(self) -> bool:
        return self.stage in WAITS


class Exchange:
    """Member group.rank of one epoch.

    holders: the members with expert slots, in the placement's order; nodes: of every member.
    holding: the experts of this member's slots, None if it is no holder. ops: the same of all
    members, for they say how rows travel. hidden, top_k: of the model. number: of the pass.
    `position` may be read by other threads at any time.
    """

    def __init__(
        self,
        group: Group,
        placement: ExpertPlacement,
        holders: Sequence[int],
        nodes: Sequence[int],
        holding: Holding | None,
        ops: SplitOps,
        hidden: int,
        top_k: int,
        mode: Mode = "exact",
        hierarchical: bool = False,
    ) -> None:
        assert (holding is not None) == (group.rank in holders)
        self.group, self.placement, self.ops, self.mode = group, placement, ops, mode
        self.holding, self.hidden = holding, hidden
        self.wire = WireRows(hidden, top_k, ops.fp8_rows)
        self.product_dtype = torch.bfloat16 if ops.fp8_rows else torch.float32
        me, device = group.rank, group.device
        here = holders.index(me) if me in holders else None
        self.first_slot = (here or 0) * placement.slots_per_holder
        self.hops = make_hops(placement, me, holders, nodes, hierarchical, device)
        self.holder_of_slot = make_hops(placement, me, holders, nodes, False, device)[0]
        home = Home(me, nodes[me], here)
        self._routes = {layer: self._route(layer, home) for layer in placement.slots}
        self.slot_rows = self._no_slot_rows()  # int64, of ours, by layer
        self.rows: list[list[int]] = []  # of each micro-batch, by member
        self._desks: list[_Desk] = []  # of each micro-batch
        self._next_part = 0
        self.number, self._layer, self._stage, self._since = 0, 0, "", time.monotonic()
        self.seconds: defaultdict[str, float] = defaultdict(float)  # in each stage so far
        self.bytes_sent = 0

    def start_pass(self, number: int, rows: Sequence[int], micro_batches: int = 1) -> None:
        """A new pass: how many rows every member brings, and in how many parts (part_sizes)."""
        parts = [part_sizes(n, micro_batches) for n in rows]
        self.rows = [list(part) for part in zip(*parts, strict=True)]
        self._next_part = 0
        while len(self._desks) < micro_batches:
            self._desks.append(_Desk.of(self))
        self.number = number
        self.at(0, "")

    def idle(self, layers: Sequence[int], micro_batches: int = 1) -> None:
        """Take part in a pass through these MoE layers without rows of our own."""
        device = self.group.device
        x_TD = torch.empty(0, self.hidden, device=device)
        weight_TK = torch.empty(0, self.wire.top_k, device=device)
        expert_TK = weight_TK.int()
        pending: list[Pending | None] = [None] * micro_batches
        for layer in layers:
            for i, before in enumerate(pending):  # the order of model/micro_batches.py
                if before is not None:
                    before.add(weight_TK, x_TD)
                pending[i] = self.begin(layer, x_TD, expert_TK)
            for now in pending:
                assert now is not None
                now.compute()
        for last in pending:
            if last is not None:
                last.add(weight_TK, x_TD)

    def begin(self, layer: int, x_TD: Tensor, expert_TK: Tensor) -> Pending:
        """Send the rows of the pass's next micro-batch towards their experts.

        x_TD: as `ops.rms_norm` gives it; expert_TK: int32 logical experts, ascending in each row.
        In the fixed modes not more rows than start_pass announced.
        """
        rows, desk = self.rows[self._next_part], self._desks[self._next_part]
        self._next_part = (self._next_part + 1) % len(self.rows)
        mine = x_TD.shape[0] if self.mode == "exact" else rows[self.group.rank]
        if x_TD.shape[0] > mine:
            raise ValueError(f"layer {layer}: {len(x_TD)} rows where this member announced {mine}")
        self.at(layer, "send")
        packed, slot_TK, splits = desk.places.pack(
            self._routes[layer], self.ops.row_words(x_TD), expert_TK,
            None if self.mode == "exact" else mine,
        )  # fmt: skip
        return Pending(self, desk, layer, rows, packed, splits, slot_TK)

    def _route(self, layer: int, home: Home) -> Route:
        chosen, device = self.placement.choose(layer, home), self.group.device
        table_ER = torch.from_numpy(chosen.table).to(device)
        count_E = torch.from_numpy(chosen.count).to(device)
        to_S = self.hops[0].member_of_slot
        return Route(table_ER, count_E, to_S, self.group.size, self.group.rank)

    def take_slot_rows(self) -> NDArray[np.int64]:
        """Rows that each slot of this member got since the last call: [MoE layers, slots]."""
        counted, self.slot_rows = self.slot_rows, self._no_slot_rows()
        counts: NDArray[np.int64] = torch.stack(list(counted.values())).cpu().numpy()
        return counts

    def _no_slot_rows(self) -> dict[int, Tensor]:
        """Counters by layer."""
        size, device = self.placement.slots_per_holder, self.group.device
        return {
            layer: torch.zeros(size, dtype=torch.int64, device=device)
            for layer in self.placement.slots
        }

    def at(self, layer: int, stage: str) -> None:
        """Note where we are, and how long we were where we were."""
        now = time.monotonic()
        self.seconds[self._stage] += now - self._since
        self._since = now  # first: nobody may see a new stage with an old time
        self._layer, self._stage = layer, stage

    @property
    def position(self) -> Position:
        return Position(self.number, self._layer, self._stage, self._since)

    def wait(self, transfer: Transfer, layer: int, stage: str) -> None:
        self.at(layer, stage)
        transfer.wait(on_device=self.mode == "static")

    def send(
        self, layer: int, stage: str, rows: Tensor, splits: list[int], expected: list[int],
        room: Room,
    ) -> tuple[Transfer, Tensor]:  # fmt: skip
        """Start sending `rows`, split by member; the other tensor will hold what comes."""
        out = room.rows(sum(expected))
        row_bytes = rows.shape[1] * rows.element_size()
        self.bytes_sent += (rows.shape[0] - splits[self.group.rank]) * row_bytes
        what = f"pass {self.number}, layer {layer}, {stage}"
        return self.group.all_to_all(out, rows, expected, splits, what), out


class _Desk(NamedTuple):
    """What the rows of a micro-batch pass in each layer; its memory serves the next layer again.

    arrived: for the rows of each hop; returned: for products.
    """

    places: RowPlaces
    arrived: list[Room]
    returned: Room

    @staticmethod
    def of(exchange: Exchange) -> _Desk:
        wire, ops, device = exchange.wire, exchange.ops, exchange.group.device
        return _Desk(
            NativePlaces(ops.library, wire.words, wire.top_k)
            if isinstance(ops, NativeOps)
            else TorchPlaces(),
            [Room(wire.width, torch.int32, device) for _ in exchange.hops],
            Room(wire.hidden, exchange.product_dtype, device),
        )


class Pending:
    """Rows on their way through one layer; `compute`, then `add`, each once."""

    def __init__(
        self, exchange: Exchange, desk: _Desk, layer: int, rows: list[int], packed: Tensor,
        splits: list[int], slot_TK: Tensor,
    ) -> None:  # fmt: skip
        self._exchange, self._desk, self._layer, self._rows = exchange, desk, layer, rows
        hop, room = exchange.hops[0], desk.arrived[0]
        self._transfer, self._arriving = self._start(hop, room, packed, splits)
        self._index_TK, self._expected = self._places(slot_TK)
        exchange.at(layer, "")

    def compute(self) -> None:
        """Run the experts of this member over all rows that came, and send the products home."""
        exchange, layer = self._exchange, self._layer
        exchange.wait(self._transfer, layer, "dispatch")
        for hop, room in zip(exchange.hops[1:], self._desk.arrived[1:], strict=True):
            packed, splits = self._routed(hop, self._arriving)
            self._transfer, self._arriving = self._start(hop, room, packed, splits)
            exchange.wait(self._transfer, layer, "dispatch")
        exchange.at(layer, "experts")
        products, splits = self._products(self._arriving)
        exchange.at(layer, "send")
        self._transfer, self._arriving = exchange.send(
            layer, "return", products, splits, self._expected, self._desk.returned
        )
        exchange.at(layer, "")

    def add(self, weight_TK: Tensor, into_TD: Tensor) -> None:
        """into[t] += weight * product of each expert of row t, in ascending order, in float32."""
        exchange, layer = self._exchange, self._layer
        exchange.wait(self._transfer, layer, "return")
        exchange.at(layer, "combine")
        if into_TD.shape[0]:
            exchange.ops.combine(self._arriving, self._index_TK, weight_TK, into_TD)
        exchange.at(layer, "")

    def _routed(self, hop: Hop, packed: Tensor) -> tuple[Tensor, list[int]]:
        """Rows that came, once for each member that the next hop wants them at, by member."""
        exchange = self._exchange
        if exchange.mode != "exact":
            return packed.repeat(len(hop.targets), 1), hop.to_all(packed.shape[0])
        slots_RK = exchange.wire.slots(packed)
        row_N, splits = self._desk.places.wanted(slots_RK, hop.member_of_slot, exchange.group.size)
        return packed[row_N], splits

    def _start(
        self, hop: Hop, room: Room, packed: Tensor, splits: list[int]
    ) -> tuple[Transfer, Tensor]:
        """Send rows, grouped by member; and what will come, in `room`."""
        exchange, members = self._exchange, self._exchange.group.size
        if exchange.mode == "exact":
            counts, ones = torch.tensor(splits, device=packed.device), [1] * members
            coming = torch.empty_like(counts)
            exchange.at(self._layer, "counts")
            what = f"pass {exchange.number}, layer {self._layer}, counts"
            exchange.group.all_to_all(coming, counts, ones, ones, what).wait()
            exchange.at(self._layer, "send")
            expected = coming.tolist()
        else:
            expected = [sum(self._rows[home] for home in homes) for homes in hop.carried]
        return exchange.send(self._layer, "dispatch", packed, splits, expected, room)

    def _places(self, slot_TK: Tensor) -> tuple[Tensor, list[int]]:
        """Where the product of each (row, expert) will be, and how many come from each member."""
        exchange, members = self._exchange, self._exchange.group.size
        lookup = exchange.holder_of_slot.member_of_slot
        if exchange.mode != "static":
            return self._desk.places.places(slot_TK, lookup, members)
        each = self._rows[exchange.group.rank] * exchange.wire.top_k
        expected = [each if m in exchange.holder_of_slot.targets else 0 for m in range(members)]
        before_M = torch.tensor([0, *expected], device=lookup.device).cumsum(0)
        count_TK = torch.arange(slot_TK.numel(), device=lookup.device).view(slot_TK.shape)
        return (before_M[lookup[slot_TK]] + count_TK).int(), expected

    def _products(self, packed: Tensor) -> tuple[Tensor, list[int]]:
        """What our experts make of rows that came, by home; and how many go to each member."""
        exchange, members = self._exchange, self._exchange.group.size
        holding, wire = exchange.holding, exchange.wire
        if holding is None:
            return packed.new_empty(0, wire.hidden, dtype=exchange.product_dtype), [0] * members
        if len(exchange.hops) > 1:  # relays mix homes, but keep the order of each
            packed = packed[wire.homes(packed).argsort(stable=True)]
        first, seen_S = exchange.first_slot, exchange.slot_rows[self._layer]
        if exchange.mode == "static":
            row_N = torch.arange(packed.shape[0], device=packed.device)
            row_N = row_N.int().repeat_interleave(wire.top_k)
            slot_RK = wire.slots(packed)
            ours_RK = (slot_RK >= first) & (slot_RK < first + len(seen_S))
            slot_N = torch.where(ours_RK, slot_RK - first, -1).flatten()
            seen_S.scatter_add_(0, slot_N.long().clamp(min=0), ours_RK.flatten().long())
            splits = [n * wire.top_k for n in self._rows]
        else:
            row_N, slot_N, splits = self._desk.places.picked(
                packed, wire.top_k, first, seen_S, members
            )
        return holding.compute(self._layer, wire.values(packed), row_N, slot_N), splits


class RemoteExperts:
    """The `Experts` of one layer, wherever they are in the epoch of the pass that runs."""

    def __init__(self, exchange: Callable[[], Exchange], layer: int) -> None:
        self._exchange, self._layer = exchange, layer

    @property
    def here(self) -> None:
        """They may be anywhere."""

    def begin(self, x_TD: Tensor, expert_TK: Tensor) -> Pending:
        return self._exchange().begin(self._layer, x_TD, expert_TK)
