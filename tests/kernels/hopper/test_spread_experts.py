"""Experts spread over members, by `CudaOps` in the interpreter: FP8 rows there, bfloat16 back."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from rayseek.cluster.exchange import Mode
from rayseek.cluster.wire_rows import WireRows
from rayseek.kernels.cuda import CudaOps
from rayseek.kernels.hopper import quantise
from tests.cluster.test_exchange import MODES, D, Everything, Stores, Unit, check, run_pass


class InTurns(CudaOps):
    """Members are threads here, and Triton's interpreter is not made for several."""

    lock = threading.Lock()

    def row_words(self, x_TD: Tensor) -> Tensor:
        with self.lock:
            return super().row_words(x_TD)

    def expert_rows(self, *arguments: Any) -> Tensor:
        with self.lock:
            return super().expert_rows(*arguments)

    def combine(self, *arguments: Any) -> None:
        with self.lock:
            super().combine(*arguments)


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
