"""Experts spread over members give the bits of experts in one place; a broken group tells all."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed import TCPStore

from rayseek.cluster.exchange import Exchange, Mode, Position, RemoteExperts
from rayseek.cluster.group import ExchangeBroken, Group, Transfer, join_store
from rayseek.cluster.participant import mode_of_pass
from rayseek.cluster.placement import ExpertPlacement, make_placement
from rayseek.kernels.native import NativeOps
from rayseek.kernels.native_build import NativeUnavailableError
from rayseek.kernels.ops import SplitOps, Weight
from rayseek.kernels.select import choose_ops
from rayseek.model.batch import Batch
from rayseek.model.checkpoint import Checkpoint
from rayseek.model.expert_slots import ExpertStore
from rayseek.model.inventory import owned_names
from rayseek.model.latent_cache import LatentCache
from rayseek.model.micro_batches import part_sizes
from rayseek.model.mtp import MTPModule
from rayseek.model.transformer import Transformer

D, EXPERTS, TOP_K, LAYERS = 48, 8, 3, (1, 2)
MODES: tuple[Mode, ...] = ("exact", "fixed", "static")
FEW = settings(max_examples=10)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Everything:
    """All experts of all layers, to be held in parts or asked in one place."""

    def __init__(self, ops: SplitOps) -> None:
        self.ops = ops
        self.each = {
            (layer, e): ops.pack_experts(
                [[Weight(randn(e + i, 24, D).bfloat16()) for i in (100 * layer, 50)]],
                [Weight(randn(e + 1000 * layer, D, 24).bfloat16())],
            )
            for layer in LAYERS
            for e in range(EXPERTS)
        }

    def joined(self, layer: int, experts: Any) -> Any:
        return self.ops.join_experts([self.each[layer, e] for e in experts])

    def expected(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> Tensor:
        self.ops.experts(x, ids, weights, self.joined(layer, range(EXPERTS)), out)
        return out


@dataclass
class Held:
    """One holder's experts."""

    every: Everything
    placement: ExpertPlacement
    holder: int
    go: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.go.set()

    def compute(self, layer: int, x_RW: Tensor, row_N: Tensor, slot_N: Tensor) -> Tensor:
        self.go.wait()
        packed = self.every.joined(layer, self.placement.experts_of(self.holder, layer))
        return self.every.ops.expert_rows(x_RW, row_N, slot_N, packed)


@pytest.fixture(scope="module")
def every() -> Everything:
    try:
        return Everything(NativeOps())
    except NativeUnavailableError as error:
        pytest.skip(str(error))


class Stores:
    """A key-value store, and a connection to it for each member."""

    def __init__(self) -> None:
        self.server = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        self.port = self.server.port
        self._clients: dict[int, TCPStore] = {}

    def group(self, prefix: str, me: int, size: int, timeout_s: float = 120) -> Group:
        if me not in self._clients:
            self._clients[me] = TCPStore("127.0.0.1", self.port, None, False)
        return Group(self._clients[me], prefix, me, size, timeout_s)


@pytest.fixture(scope="module")
def store() -> Stores:
    return Stores()


NAMES = itertools.count()


@dataclass
class Unit:
    """Members as threads of this process. nodes: of each; the last `holders` of them hold."""

    store: Stores
    every: Everything
    nodes: list[int]
    holders: list[int]
    mode: Mode = "exact"
    hierarchical: bool = False
    redundant: int = 0
    timeout_s: float = 600.0
    exchanges: dict[int, Exchange] = field(default_factory=dict)

    def __post_init__(self) -> None:
        loads = {layer: randn(layer, EXPERTS).exp().tolist() for layer in LAYERS}
        nodes = [self.nodes[h] for h in self.holders]
        self.placement = make_placement(loads, nodes, self.redundant, 4)
        self.held = {m: Held(self.every, self.placement, i) for i, m in enumerate(self.holders)}

    def run(self, work: Callable[[Exchange], Any]) -> list[Any]:
        """`work` of every member; what it returned, or the ExchangeBroken that it met."""
        prefix = f"unit{next(NAMES)}"

        def member(me: int) -> Any:
            with torch.inference_mode():
                group = self.store.group(prefix, me, len(self.nodes), self.timeout_s)
                self.exchanges[me] = exchange = Exchange(
                    group, self.placement, self.holders, self.nodes, self.held.get(me),
                    self.every.ops, D, TOP_K, self.mode, self.hierarchical,
                )  # fmt: skip
                try:
                    return work(exchange)
                except ExchangeBroken as broken:
                    return broken
                finally:
                    group.close()

        with ThreadPoolExecutor(len(self.nodes)) as threads:
            return list(threads.map(member, range(len(self.nodes))))


@dataclass
class Rows:
    """Random rows of one home for every layer; x: as the operations' norm would give it."""

    x: Tensor
    ids: Tensor
    weights: Tensor
    into: Tensor

    @staticmethod
    def of(home: int, layer: int, count: int, seed: int, ops: SplitOps | None = None) -> Rows:
        seed = seed * 1000 + home * 10 + layer
        chosen = randn(seed, count, EXPERTS).topk(TOP_K).indices.sort().values.int()
        wide = randn(seed + 1, count, D + 4)
        x = wide[:, :D].bfloat16() if ops is not None and ops.fp8_rows else wide[:, :D]
        return Rows(x, chosen, randn(seed + 2, count, TOP_K).abs(), wide[:, :D].clone())


def run_pass(exchange: Exchange, rows: list[int], seed: int, parts: int) -> list[Tensor]:
    """One member's pass through all layers, in the order of the model; its results by layer."""
    me = exchange.group.rank
    exchange.start_pass(seed, rows, parts)
    if not rows[me]:
        exchange.idle(LAYERS, parts)
        return [torch.empty(0, D)] * len(LAYERS)
    sizes = part_sizes(rows[me], parts)
    results: dict[int, list[Tensor]] = {layer: [] for layer in LAYERS}
    pending: list[Any] = [None] * parts

    def finish(i: int) -> None:
        if pending[i] is not None:
            layer, under_way, weights, into = pending[i]
            under_way.add(weights, into)
            results[layer].append(into)

    for layer in LAYERS:
        mine = Rows.of(me, layer, rows[me], seed, exchange.ops)
        experts = RemoteExperts(lambda: exchange, layer)
        each = (mine.x, mine.ids, mine.weights, mine.into)
        for i, (x, ids, weights, into) in enumerate(
            zip(*(t.split(sizes) for t in each), strict=True)
        ):
            finish(i)
            pending[i] = (layer, experts.begin(x, ids), weights, into)
        for _, under_way, _, _ in pending:
            under_way.compute()
    for i in range(parts):
        finish(i)
    return [torch.cat(results[layer]) for layer in LAYERS]


def check(unit: Unit, rows: list[int], seed: int, parts: int = 1) -> None:
    got = unit.run(lambda exchange: run_pass(exchange, rows, seed, parts))
    for me, count in enumerate(rows):
        assert not isinstance(got[me], ExchangeBroken), got[me]
        for layer, result in zip(LAYERS, got[me], strict=True):
            mine = Rows.of(me, layer, count, seed, unit.every.ops)
            expected = unit.every.expected(layer, mine.x, mine.ids, mine.weights, mine.into)
            assert torch.equal(result, expected), (me, layer)


@pytest.mark.parametrize("mode", MODES)
@given(
    attention=st.integers(1, 3),
    dedicated=st.integers(0, 5),
    redundant=st.sampled_from([0, 1, 8]),
    parts=st.integers(1, 2),
    counts=st.lists(st.sampled_from([0, 1, 2, 5, 17]), min_size=3, max_size=3),
    nodes=st.integers(1, 3),
    hierarchical=st.booleans(),
    seed=st.integers(0, 99),
)
@FEW
def test_spread_experts_are_local_experts(
    every: Everything, store: Stores, mode: Mode, attention: int, dedicated: int,
    redundant: int, parts: int, counts: list[int], nodes: int, hierarchical: bool, seed: int,
) -> None:  # fmt: skip
    members = attention + dedicated
    rows = counts[:attention] + [0] * dedicated
    holders = list(range(attention, members)) if dedicated else list(range(members))
    node_of = [m * nodes // members for m in range(members)]
    check(Unit(store, every, node_of, holders, mode, hierarchical, redundant), rows, seed, parts)


@pytest.mark.parametrize("mode", MODES)
def test_rows_are_counted_at_their_slots(every: Everything, store: Stores, mode: Mode) -> None:
    unit = Unit(store, every, [0, 0, 0], [1, 2], mode, redundant=2)
    check(unit, [20, 0, 0], 3)
    counted = [unit.exchanges[member].take_slot_rows() for member in unit.holders]
    assert not unit.exchanges[1].take_slot_rows().any()
    for i, layer in enumerate(LAYERS):
        per_expert = [0] * EXPERTS
        for holder, counts in enumerate(counted):
            experts = unit.placement.experts_of(holder, layer)
            for expert, count in zip(experts, counts[i].tolist(), strict=True):
                per_expert[expert] += count
        ids = Rows.of(0, layer, 20, 3).ids
        assert per_expert == torch.bincount(ids.flatten(), minlength=EXPERTS).tolist()


@pytest.mark.parametrize("mode", ["exact", "fixed"])
def test_a_node_is_sent_one_copy_of_a_row(
    every: Everything, store: Stores, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: dict[tuple[int, int], int] = {}
    plain = Group.all_to_all

    def recorded(self: Group, out: Tensor, source: Tensor, *rest: Any) -> Transfer:
        if "dispatch" in rest[-1] and "layer 1" in rest[-1]:
            for to, count in enumerate(rest[1]):
                sent[self.rank, to] = sent.get((self.rank, to), 0) + count
        return plain(self, out, source, *rest)

    monkeypatch.setattr(Group, "all_to_all", recorded)
    nodes = [0, 0, 1, 1]
    unit = Unit(store, every, nodes, [0, 1, 2, 3], mode, hierarchical=True)
    check(unit, [30, 0, 0, 0], 1)
    ids = Rows.of(0, 1, 30, 1).ids
    far = {e for h in (2, 3) for e in unit.placement.experts_of(h, 1)}
    wanted = sum(bool(far & set(row)) for row in ids.tolist())
    assert sent[0, 2] == (wanted if mode == "exact" else 30)
    assert sent[0, 3] == 0 and sent[2, 3] > 0


@pytest.mark.parametrize("holders, most", [(1, 32), (2, 32), (8, 32), (16, 16), (144, 1), (300, 0)])
def test_rows_go_to_everybody_while_that_is_few(holders: int, most: int) -> None:
    fixed = [rows for rows in range(1, 600) if mode_of_pass("auto", rows, holders) == "fixed"]
    assert fixed == list(range(1, most + 1))
    assert mode_of_pass("exact", 1, holders) == "exact"
    assert mode_of_pass("fixed", 600, holders) == "fixed"


def test_more_rows_than_announced_are_refused(every: Everything, store: Stores) -> None:
    def work(exchange: Exchange) -> None:
        exchange.start_pass(1, [2])
        mine = Rows.of(0, 1, 3, 1)
        with pytest.raises(ValueError, match="layer 1: 3 rows where this member announced 2"):
            exchange.begin(1, mine.x, mine.ids)

    Unit(store, every, [0], [0], "fixed").run(work)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("parts", [1, 2])
def test_whoever_leaves_ends_the_pass_for_all(
    every: Everything, store: Stores, mode: Mode, parts: int
) -> None:
    unit = Unit(store, every, [0, 0, 0, 0], [2, 3], mode)
    left = threading.Event()

    def work(exchange: Exchange) -> float:
        for number in range(1000):
            if exchange.group.rank == 3 and number == 5:
                left.set()
                unit.exchanges[3].group.close()
                raise ExchangeBroken("left")
            run_pass(exchange, [3, 1, 0, 0], number, parts)
        return 0.0

    start = time.monotonic()
    outcomes = unit.run(work)
    assert left.is_set() and time.monotonic() - start < unit.timeout_s / 2
    assert all(isinstance(outcome, ExchangeBroken) for outcome in outcomes)
    assert all("pass 5, layer 1" in str(outcome) for outcome in outcomes[:3]), outcomes


def test_a_stalled_member_can_be_told_from_those_who_wait(every: Everything, store: Stores) -> None:
    unit = Unit(store, every, [0, 0, 0], [1, 2])
    unit.held[2].go.clear()
    wanted = [(7, 1, "return"), (7, 1, "return"), (7, 1, "experts")]
    positions: list[Position] = []

    def look() -> None:
        end = time.monotonic() + 300
        while [p[:3] for p in positions] != wanted and time.monotonic() < end:
            time.sleep(0.01)
            positions[:] = [exchange.position for _, exchange in sorted(unit.exchanges.items())]
        unit.held[2].go.set()

    watch = threading.Thread(target=look)
    watch.start()
    unit.run(lambda exchange: run_pass(exchange, [2, 0, 0], 7, 1))
    watch.join()
    assert [p[:3] for p in positions] == wanted
    assert [p.waits for p in positions] == [True, True, False]


def test_a_group_that_cannot_form_says_so(store: Stores) -> None:
    with pytest.raises(ExchangeBroken, match="forming group lonely as member 0 of 2"):
        store.group("lonely", 0, 2, 0.3)
    with pytest.raises(ExchangeBroken, match="store 127.0.0.1:9"):
        join_store("127.0.0.1", 9, 0.3)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells the policy of threads")
def test_threads_of_a_group_interrupt_nobody(store: Stores) -> None:
    before = {int(name) for name in os.listdir("/proc/self/task")}
    group = store.group("considerate", 0, 1)
    started = {int(name) for name in os.listdir("/proc/self/task")} - before
    assert {os.sched_getscheduler(thread) for thread in started} == {os.SCHED_BATCH}
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
    group.close()


VICTIM = """
import os, signal, sys, time, torch
from rayseek.cluster.group import Group, join_store
group = Group(join_store("127.0.0.1", int(sys.argv[1]), 120), "killed", 2, 3, 120)
for number in range(50):
    group.all_gather([number])
print(time.time(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_is_noticed_by_all_at_once(store: Stores) -> None:
    def survive(me: int) -> float:
        group = store.group("killed", me, 3)
        try:
            for number in itertools.count():
                group.all_gather([number])
        except ExchangeBroken:
            return time.time()
        finally:
            group.close()

    with ThreadPoolExecutor(2) as threads:
        noticed = [threads.submit(survive, me) for me in range(2)]
        command = [sys.executable, "-c", VICTIM, str(store.port)]
        victim = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert victim.returncode == -signal.SIGKILL, victim.stderr
        died = float(victim.stdout)
        assert all(0 <= each.result() - died < 60 for each in noticed)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("holders, parts", [([0, 1], 1), ([2], 2), ([2, 3, 4], 2)])
def test_a_model_over_members_is_the_model(
    tiny_model: tuple[Transformer, MTPModule], tiny_path: Path, store: Stores, mode: Mode,
    holders: list[int],
    parts: int,
) -> None:  # fmt: skip
    """Two attention ranks, one of which has nothing to do in the second pass."""
    local, _ = tiny_model
    if local.ops.name != "native":
        pytest.skip("needs operations that do not depend on company")
    config, ops = local.config, choose_ops().ops
    moe = [layer for layer in range(config.num_hidden_layers) if config.is_moe(layer)]
    loads = dict.fromkeys(moe, [1.0] * config.n_routed_experts)
    nodes = [0] * (1 + max(1, *holders))
    placement = make_placement(loads, [0] * len(holders), redundant=2)
    checkpoint = Checkpoint.open(tiny_path)
    weights = checkpoint.load(owned_names(config, {}), progress=False)
    prefix = f"model{next(NAMES)}"
    prompts = [[5, 6, 7, 8, 9], [10, 11, 12]]
    batches = [Batch.of_sequences([ids], [0], [[0]]) for ids in prompts]

    def member(me: int) -> list[Tensor]:
        group = store.group(prefix, me, len(nodes))
        held = None
        if me in holders:
            lists = {n: placement.experts_of(holders.index(me), n) for n in moe}
            held = ExpertStore(checkpoint, ops).load(lists)
        exchange = Exchange(
            group, placement, holders, nodes, held, ops, config.hidden_size,
            config.num_experts_per_tok, mode,
        )  # fmt: skip

        def remote(name: str) -> RemoteExperts:
            return RemoteExperts(lambda: exchange, int(name.rpartition(".")[2]))

        results = []
        with torch.inference_mode():
            model = Transformer(config, weights, ops, 64, experts=remote) if me < 2 else None
            for number, rows in enumerate(([5, 3], [0, 3])):
                exchange.start_pass(number, rows + [0] * (len(nodes) - 2), parts)
                if model is None or not rows[me]:
                    exchange.idle(moe, parts)
                else:
                    cache = LatentCache(config, 1, ops)
                    results.append(model.hidden(batches[me], cache.layers, parts))
        group.close()
        return results

    with ThreadPoolExecutor(len(nodes)) as threads:
        got = list(threads.map(member, range(len(nodes))))
    with torch.inference_mode():
        for me, count in ((0, 1), (1, 2)):
            expected = local.hidden(batches[me], LatentCache(config, 1, ops).layers)
            assert len(got[me]) == count
            assert all(torch.equal(result, expected) for result in got[me])
