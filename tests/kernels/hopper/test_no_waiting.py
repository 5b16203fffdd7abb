"""A step asks the host for nothing: it runs on tensors that have no values.

On torch's meta device every way of waiting for a value (`item`, `tolist`, `cpu`, `nonzero`, a mask
as an index, a tensor in an `if`) is an error, as it is while a CUDA graph is recorded. The kernels'
launches are noted and not carried out.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from rayseek.kernels.cuda import CudaOps
from rayseek.kernels.hopper.sample import draw_prepared, prepare
from rayseek.kernels.kv_format import KVDtype
from rayseek.kernels.ops import Weight
from rayseek.kernels.sample import Draw
from rayseek.model.batch import Batch
from rayseek.model.cached_model import CachedModel
from rayseek.model.mtp import MTPModule
from rayseek.model.transformer import Transformer
from tests.kernels.hopper.test_cuda_ops import CONFIG, RandomWeights

META = torch.device("meta")


class WithoutValues(RandomWeights):
    """Weights of the right shapes on the meta device."""

    def tensor(self, name: str) -> Tensor:
        return super().tensor(name).to(META)

    def weight(self, name: str) -> Weight:
        made = super().weight(name)
        return Weight(
            made.data.to(META), None if made.scale_inv is None else made.scale_inv.to(META)
        )


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel was launched."""
    found: Counter[str] = Counter()

    def launch(self: Any, *arguments: Any, **options: Any) -> None:
        for argument in arguments:
            assert not isinstance(argument, Tensor) or argument.device == META
        found[self.fn.__name__] += 1

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    return found


@pytest.mark.parametrize("fp8, kv", [(True, "auto"), (False, "fp8")])
@pytest.mark.parametrize("rows", [3, 200])
def test_a_step_waits_for_nothing(
    launched: Counter[str], fp8: bool, kv: KVDtype, rows: int
) -> None:
    """The main model, the draft module, and the draw with all its filters."""
    config = replace(CONFIG, num_nextn_predict_layers=1)
    weights, ops = WithoutValues(config, fp8), CudaOps("meta", kv)
    main = Transformer(config, weights, ops, 256)  # type: ignore[arg-type]
    model = CachedModel(main, 6, MTPModule(config, weights, ops, main))  # type: ignore[arg-type]
    launched.clear()
    batch = Batch.of_sequences([[5] * rows], [0], [[4, 1, 2, 3]], [rows]).to(META)
    passed = model.forward(batch)
    assert passed.normed_TD is not None
    drafted = model.draft(batch, passed.normed_TD)
    draws = [Draw(0.7, 5, 0.9, 0.1, 1, i) for i in range(len(passed.logits_RV))]
    ids = draw_prepared(drafted.logits_RV, prepare(draws, META))
    assert passed.logits_RV.shape == (rows, config.vocab_size) and ids.device == META
    layers, moe = 3, 3 - config.first_k_dense_replace
    assert launched["decode_fp8_kernel" if kv == "fp8" else "decode_kernel"] == layers
    assert launched["route_kernel"] == moe and launched["combine_kernel"] >= moe
    assert launched["cut_kernel"] == launched["draw_kernel"] == launched["pick_kernel"] == 1


def test_waiting_would_be_noticed() -> None:
    x = torch.ones(3, device=META)
    for wait in (x.tolist, x.sum().item, x.cpu, x.nonzero, lambda: x[x > 0], lambda: bool(x[0])):
        with pytest.raises((NotImplementedError, RuntimeError)):
            wait()
