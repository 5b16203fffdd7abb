"""What an exchange costs on this machine, beside the bare transfers it is made of.

Members are processes on loopback. Each layer's exchange runs with experts that take no time, then
the same transfers are made again with tensors at hand: the difference is what packing, choosing and
placing rows cost. Medians, in microseconds; `rayseek bench --exchange` prints them.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from rayseek.cluster.exchange import Exchange, Mode
from rayseek.cluster.group import Group, Transfer
from rayseek.cluster.placement import make_placement
from rayseek.kernels.select import choose_ops

EXPERTS, TOP_K, HIDDEN = 32, 4, 256  # of the model that `rayseek bench` measures
WARM, LAYERS = 50, 400


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
    bytes: int

    @property
    def ratio(self) -> float:
        return self.exchange_us / self.transfers_us


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

    def compute(self, layer: int, x_RD: Tensor, row_N: Tensor, slot_N: Tensor) -> Tensor:
        return torch.empty(len(row_N), x_RD.shape[1])


class _Recorder(Group):
    """Notes every transfer's shape, to be made again."""

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
    group = _Recorder("127.0.0.1", port, "bench", me, size, 60)
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
    times: list[tuple[float, float]] = []
    for number in range(WARM + LAYERS):
        group.made = []
        exchange.start_pass(number, rows)
        start = time.perf_counter()
        pending = exchange.begin(0, x_TD, chosen)
        pending.compute()
        pending.add(weight_TK, into_TD)
        middle = time.perf_counter()
        for transfer in list(group.made):
            Group.all_to_all(group, *transfer).wait()
        times.append((middle - start, time.perf_counter() - middle))
    if me == 0:
        exchanges, transfers = zip(*times[WARM:], strict=True)
        costs.put(
            Cost(
                statistics.median(exchanges) * 1e6, statistics.median(transfers) * 1e6,
                exchange.bytes_sent // (WARM + LAYERS),
            )
        )  # fmt: skip
    group.close()


def run() -> None:
    """Measure every case and print it as it is done."""
    print("attention experts rows mode   exchange us  transfers us  ratio  bytes sent")
    for case in CASES:
        cost = measure(case)
        experts = case.holders or "inside"
        print(
            f"{case.attention:9} {experts:>7} {case.rows:4} {case.mode:6} {cost.exchange_us:11.0f} "
            f"{cost.transfers_us:13.0f} {cost.ratio:6.2f} {cost.bytes:11,}",
            flush=True,
        )
