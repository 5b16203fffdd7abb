"""What an exchange costs on this machine, beside the bare transfers it is made of.

Members are processes on loopback. In turns: layers are exchanged, with experts that take no time;
as many times the same transfers are made with tensors at hand by gloo, as torch sets it up; and by
the exchange's own group, whose threads interrupt nobody (group.py): to that, the difference is what
choosing, packing and placing rows cost. Medians, in microseconds; `rayseek bench --exchange` prints
them.
"""

from __future__ import annotations

import functools
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, TCPStore

from rayseek.cluster.exchange import Exchange, Mode
from rayseek.cluster.group import Group, Transfer
from rayseek.cluster.placement import make_placement
from rayseek.kernels.select import choose_ops

EXPERTS, TOP_K, HIDDEN = 32, 4, 256  # of the model that `rayseek bench` measures
LAYERS, WARM, TURNS = 20, 3, 25  # layers of a turn; turns before those that count; those


@dataclass(frozen=True, slots=True)
class Case:
    """`rows` from each attention rank. holders 0: the attention ranks hold the experts."""

    attention: int
    holders: int
    rows: int
    mode: Mode


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one layer at the first attention rank: microseconds, and bytes it sends."""

    exchange_us: float
    transfers_us: float
    gloo_us: float
    bytes: int


MODES: dict[int, tuple[Mode, ...]] = {1: ("exact", "fixed"), 8: ("exact", "fixed"), 512: ("exact",)}
CASES = [
    Case(attention, holders, rows, mode)
    for attention, holders in ((2, 0), (1, 2))
    for rows, modes in MODES.items()
    for mode in modes
]


def measure(case: Case) -> Cost:
    """Run one case in processes of its own."""
    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    costs = context.SimpleQueue()
    processes = [
        context.Process(target=_member, args=(case, store.port, me, costs))
        for me in range(case.attention + case.holders)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"a member of {case} ended with exit code {process.exitcode}")
    cost: Cost = costs.get()
    return cost


class _NoWork:
    """Experts that cost nothing, so that only the exchange is left."""

    def __init__(self) -> None:
        self._products: dict[int, Tensor] = {}

    def compute(self, layer: int, x_RD: Tensor, row_N: Tensor, slot_N: Tensor) -> Tensor:
        rows = len(row_N)
        if rows not in self._products:
            self._products[rows] = torch.zeros(rows, x_RD.shape[1])
        return self._products[rows]


class _Recorder(Group):
    """Notes the transfers of an exchange, to be made again."""

    made: list[tuple[Tensor, Tensor, list[int], list[int]]]

    def all_to_all(self, out: Tensor, source: Tensor, *rest: Any) -> Transfer:
        self.made.append((out, source, *rest[:2]))
        return super().all_to_all(out, source, *rest)


@torch.inference_mode()
def _member(case: Case, port: int, me: int, costs: Any) -> None:
    torch.set_num_threads(1)
    size = case.attention + case.holders
    holders = list(range(case.attention, size)) if case.holders else list(range(size))
    placement = make_placement({0: [1.0] * EXPERTS}, [0] * len(holders))
    store = TCPStore("127.0.0.1", port, None, False)
    gloo: Any = ProcessGroupGloo(PrefixStore("gloo", store), me, size, timedelta(seconds=60))
    group = _Recorder(store, "bench", me, size, 60)
    exchange = Exchange(
        group, placement, holders, [0] * size, _NoWork() if me in holders else None,
        choose_ops().ops, HIDDEN, TOP_K, case.mode,
    )  # fmt: skip
    mine = case.rows if me < case.attention else 0
    make = torch.Generator().manual_seed(me)
    x_TD = torch.randn(mine, HIDDEN, generator=make)
    chosen = torch.rand(mine, EXPERTS, generator=make).topk(TOP_K).indices.sort().values.int()
    weight_TK, into_TD = torch.ones(mine, TOP_K), torch.zeros(mine, HIDDEN)
    rows = [case.rows if m < case.attention else 0 for m in range(size)]

    def exchanged() -> None:
        exchange.start_pass(0, rows)
        for _ in range(LAYERS):
            group.made = []
            pending = exchange.begin(0, x_TD, chosen)
            pending.compute()
            pending.add(weight_TK, into_TD)

    def transferred(start: Callable[..., Any]) -> None:
        for transfer in group.made * LAYERS:
            start(*transfer).wait()

    own = functools.partial(Group.all_to_all, group)
    turns: list[Callable[[], None]] = [
        exchanged,
        lambda: transferred(own),
        lambda: transferred(gloo.alltoall_base),
    ]
    times: list[list[float]] = [[], [], []]
    for _ in range(WARM + TURNS):
        for turn, taken in zip(turns, times, strict=True):
            gloo.barrier().wait()
            start = time.perf_counter()
            turn()
            taken.append((time.perf_counter() - start) / LAYERS * 1e6)
    if me == 0:
        exchange_us, transfers_us, gloo_us = (statistics.median(taken[WARM:]) for taken in times)
        sent = exchange.bytes_sent // ((WARM + TURNS) * LAYERS)
        costs.put(Cost(exchange_us, transfers_us, gloo_us, sent))
    group.close()


def run() -> None:
    """Measure every case and print it as it is done."""
    print(
        "attention experts rows mode   exchange us  transfers us  ratio  gloo us  ratio  bytes sent"
    )
    for case in CASES:
        cost = measure(case)
        experts, exchange, own = case.holders or "inside", cost.exchange_us, cost.transfers_us
        print(
            f"{case.attention:9} {experts:>7} {case.rows:4} {case.mode:6} {exchange:11.0f} "
            f"{own:13.0f} {exchange / own:6.2f} {cost.gloo_us:8.0f} {exchange / cost.gloo_us:6.2f} "
            f"{cost.bytes:11,}",
            flush=True,
        )
