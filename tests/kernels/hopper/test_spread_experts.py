"""Experts spread over members, by `CudaOps` in the interpreter: FP8 rows there, bfloat16 back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from rayseek.cluster.exchange import Exchange, Mode, RemoteExperts
from rayseek.cluster.placement import make_placement
from rayseek.cluster.wire_rows import WireRows
from rayseek.kernels.cuda import CudaOps
from rayseek.kernels.hopper import quantise
from rayseek.model.batch import Batch
from rayseek.model.latent_cache import LatentCache
from rayseek.model.moe import Experts
from rayseek.model.transformer import Transformer
from tests.cluster.test_exchange import MODES, D, Everything, Stores, Unit, check, run_pass
from tests.kernels.hopper.test_cuda_ops import CONFIG, RandomWeights


class InTurns(CudaOps):
    """Members are threads here, and Triton's interpreter is not made for several."""

    lock = threading.RLock()

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if not callable(found):
            return found

        def call(*arguments: Any, **options: Any) -> Any:
            with InTurns.lock:
                return found(*arguments, **options)

        return call


@pytest.fixture(scope="module")
def every() -> Everything:
    return Everything(InTurns("cpu"))


@pytest.fixture(scope="module")
def store() -> Stores:
    return Stores()


@pytest.mark.parametrize("mode", MODES)
def test_spread_experts_are_local_experts(every: Everything, store: Stores, mode: Mode) -> None:
    """With the bits of one place, where rows are quantised as well; the second member is idle."""
    check(Unit(store, every, [0, 0], [0, 1], mode), [5, 0], 3)
    check(Unit(store, every, [0, 1, 1], [1, 2], mode, hierarchical=True), [4, 2, 0], 4, parts=2)


def test_rows_travel_in_few_bytes(every: Everything, store: Stores) -> None:
    """As many as `WireRows` says, which fit.py and cost.py reckon with."""
    unit = Unit(store, every, [0, 0], [1], "fixed")
    home, holder = unit.run(lambda exchange: (run_pass(exchange, [3, 0], 1, 1), exchange)[1])
    wire = WireRows(D, 3, fp8=True)
    assert home.bytes_sent == 2 * 3 * wire.row_bytes and wire.row_bytes == D + 4 + 4 * 3 + 4
    assert holder.bytes_sent == 2 * 9 * wire.product_bytes and wire.product_bytes == 2 * D


def test_rows_are_sent_as_they_are_quantised_here() -> None:
    x = torch.randn(4, 200, generator=torch.Generator().manual_seed(1)).bfloat16()
    words = CudaOps("cpu").row_words(x)
    wide = torch.nn.functional.pad(words, (0, 3))
    (data, scale), (sent, sent_scale) = quantise.quantise(x), quantise.from_words(wide[:, :-3], 200)
    assert words.dtype is torch.int32 and words.shape == (4, WireRows(200, 0, fp8=True).words)
    assert torch.equal(sent.float(), data.float()) and torch.equal(sent_scale, scale)


@pytest.mark.parametrize("mode", ["exact", "fixed"])
def test_a_model_over_members_is_the_model(store: Stores, mode: Mode) -> None:
    """An attention rank that holds half of the experts, and an expert rank."""
    ops, weights = InTurns("cpu"), RandomWeights(CONFIG, fp8=True)
    moe = [n for n in range(CONFIG.num_hidden_layers) if CONFIG.is_moe(n)]
    placement = make_placement({n: [1.0] * CONFIG.n_routed_experts for n in moe}, [0, 0])
    batch = Batch.of_sequences([[5, 6, 7]], [0], [[0]])

    def model(experts: Callable[[str], Experts] | None = None) -> Tensor:
        made = Transformer(CONFIG, weights, ops, 64, experts=experts)  # type: ignore[arg-type]
        return made.hidden(batch, LatentCache(CONFIG, 1, ops).layers)

    def packed(layer: int, chosen: Sequence[int]) -> Any:
        names = [f"model.layers.{layer}.mlp.experts.{e}" for e in chosen]
        return ops.pack_experts(
            [[weights.weight(f"{n}.{p}_proj.weight") for p in ("gate", "up")] for n in names],
            [weights.weight(f"{n}.down_proj.weight") for n in names],
        )

    class Half:
        def __init__(self, me: int) -> None:
            self.packed = {n: packed(n, placement.experts_of(me, n)) for n in moe}

        def compute(self, layer: int, x_RW: Tensor, row_N: Tensor, slot_N: Tensor) -> Tensor:
            return ops.expert_rows(x_RW, row_N, slot_N, self.packed[layer])

    def member(me: int) -> Tensor | None:
        group = store.group(f"model {mode}", me, 2)
        exchange = Exchange(
            group, placement, [0, 1], [0, 0], Half(me), ops, CONFIG.hidden_size,
            CONFIG.num_experts_per_tok, mode,
        )  # fmt: skip
        exchange.start_pass(0, [3, 0])
        with torch.inference_mode():
            if me:
                return exchange.idle(moe)
            return model(lambda name: RemoteExperts(lambda: exchange, int(name.split(".")[-1])))

    with ThreadPoolExecutor(2) as threads:
        spread, _ = threads.map(member, range(2))
    assert spread is not None and torch.equal(spread, model())
