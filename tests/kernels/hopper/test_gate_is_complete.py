"""Whatever the engine launches for DeepSeek-V3, the offline gate has compiled, as it is launched.

A slice of V3 at its true dimensions runs on torch's meta device: no tensor has values, and no
kernel runs, but every launch has the arguments that it would have on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from rayseek.cluster.slice_bench import RandomWeights, sliced
from rayseek.kernels.cuda import CudaOps
from rayseek.kernels.hopper.offline import Variant, variants
from rayseek.kernels.hopper.sample import draw_prepared, prepare
from rayseek.kernels.kv_format import KVDtype
from rayseek.kernels.sample import Draw
from rayseek.model.batch import Batch
from rayseek.model.cached_model import CachedModel
from rayseek.model.mtp import MTPModule
from rayseek.model.official import DEEPSEEK_V3
from rayseek.model.transformer import Transformer

META = torch.device("meta")
NAMES = {
    torch.bfloat16: "bf16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8e4nv",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
CHOICES = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")


class Launch:
    """Arguments of one launch, as the just-in-time compiler would see them."""

    def __init__(
        self, kernel: str, names: list[str], arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        self.kernel = kernel, *names
        self.options = {k: options.pop(k) for k in CHOICES if k in options}
        self.given = {**dict(zip(names, arguments, strict=False)), **options}
        assert set(self.given) == set(names)

    def differs_from(self, variant: Variant) -> list[str]:
        """Names of what this variant has otherwise."""
        wrong = [n for n, v in variant.constants.items() if self.given[n] != v]
        for name in self.given.keys() - variant.constants.keys():
            value, kind = self.given[name], variant.types.get(name, "i32")
            if value is None:  # the kernel does not use it then
                continue
            if isinstance(value, Tensor):
                same = kind == f"*{NAMES[value.dtype]}"
            elif isinstance(value, TensorDescriptor):
                shape = ", ".join(map(str, value.block_shape))
                same = kind == f"tensordesc<{NAMES[value.base.dtype]}[{shape}]>"
            elif isinstance(value, float):
                same = kind == "fp32"
            else:  # an integer that is a multiple of 16, or 1, may be taken for that
                same = kind == "i32" and (value % 16 == 0 or name in variant.unaligned)
            wrong += [] if same else [name]
        built = {"num_warps": variant.warps, "num_stages": variant.stages} | dict(
            variant.options or {}
        )
        asked = {"num_warps": 4, "num_stages": 3} | self.options  # Triton's, where not said
        return wrong + [n for n, v in asked.items() if built.get(n) != v]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    found: list[Launch] = []

    def launch(self: Any, *arguments: Any, **options: Any) -> None:
        found.append(Launch(self.fn.__name__, self.arg_names, arguments, options))

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    yield found


@pytest.mark.parametrize("kv", ["auto", "fp8"])
def test_every_launch_of_a_step_is_in_the_gate(launches: list[Launch], kv: KVDtype) -> None:
    """One row, a decode step's, a prompt's, with the draft module and with filtered draws."""
    config = replace(sliced(DEEPSEEK_V3, 3), num_nextn_predict_layers=1)
    weights, ops = RandomWeights(config, "meta"), CudaOps("meta", kv)
    main = Transformer(config, weights, ops, 8192)  # type: ignore[arg-type]
    mtp = MTPModule(config, weights, ops, main)  # type: ignore[arg-type]
    model = CachedModel(main, 80, mtp)
    launches.clear()
    for rows in (1, 3, 24, 48, 100, 300, 4096):
        table = list(range(-(-rows // 64)))
        batch = Batch.of_sequences([[5] * rows], [0], [table], [min(rows, 100)]).to(META)
        passed = model.forward(batch)
        assert passed.normed_TD is not None
        model.remember(batch, passed.normed_TD)
        logits = model.draft(batch, passed.normed_TD).logits_RV
        for top_p in (1.0, 0.9):
            draws = [Draw(0.7, 0, top_p, 0.0, 1, i) for i in range(len(logits))]
            draw_prepared(logits, prepare(draws, META))
    known: dict[tuple[str, ...], list[Variant]] = {}
    for variant in variants():
        kernel = variant.kernel.fn.__name__, *variant.kernel.arg_names
        known.setdefault(kernel, []).append(variant)
    missing = set()
    for launch in launches:
        candidates = (launch.differs_from(v) for v in known.get(launch.kernel, []))
        nearest = min(candidates, key=len, default=["?"])
        if nearest:
            shown = {n: _shown(launch.given.get(n, launch.options.get(n))) for n in nearest}
            missing.add(f"{launch.kernel[0]}: {shown}")
    assert not missing, "\n".join(sorted(missing))


def _shown(value: Any) -> Any:
    return NAMES[value.dtype] if isinstance(value, Tensor) else value
