"""The kernel bench, as far as it goes without a GPU: every case runs and agrees, at tiny sizes."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from rayseek.kernels.hopper import bench, bench_others
from rayseek.kernels.hopper.bench_cases import Case, Dimensions, cases

TINY = Dimensions(
    hidden=128, heads=2, q_lora=64, latent=64, rope=16, nope=16, value=16, dense=128, expert=128,
    experts=8, groups=4, keep=2, top_k=2, vocab=300, rows=(1, 16), contexts=((1, 100), (3, 65)),
    prompts=((40, 40), (5, 40)),
)  # fmt: skip
BOUND = {"fp8 gemm": 2**-7, "grouped fp8": 2**-7, "bf16 gemm": 2**-7, "mla decode": 2**-6,
         "mla decode fp8": 2**-6, "mla prefill": 2**-6, "store_latents": 2**-8,
         "store_latents fp8": 2**-4, "rms_norm + quantise": 2**-4,
         "silu * up + quantise": 2**-4}  # fmt: skip
CASES = {f"{case.kernel} {case.shape}": case for case in cases(TINY, "cpu")}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_case_runs_and_agrees(case: Case) -> None:
    torch.manual_seed(0)
    built = case.build()
    built.run()
    assert built.error() <= BOUND.get(case.kernel, 1e-6)
    assert built.bytes > 0 and (built.flops > 0) == (built.peak != "hbm")


def test_others_are_asked_if_they_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By stand-ins for the packages: names of what is called, and shapes that fit together."""
    called: list[str] = []

    class Package(ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)

            def call(*arguments: Any) -> Any:
                called.append(name)
                return (torch.zeros(1), torch.zeros(1)) if name == "get_mla_metadata" else self

            return call

    for name in ("deep_gemm", "flash_mla", "flashinfer", "flashinfer.mla"):
        monkeypatch.setitem(sys.modules, name, Package(name))
    for kernel, expected in {
        "fp8 gemm": ["fp8_gemm_nt"],
        "grouped fp8": ["m_grouped_fp8_gemm_nt_masked"],
        "mla decode": ["get_mla_metadata", "BatchMLAPagedAttentionWrapper", "plan",
                       "flash_mla_with_kvcache", "run"],
        "mla decode fp8": [],
    }.items():  # fmt: skip
        called.clear()
        others = next(case for case in cases(TINY, "cpu") if case.kernel == kernel).build().others
        for label, run in others.items():
            if label in ("DeepGEMM", "FlashMLA", "FlashInfer"):
                run()
        assert called == expected
    others = {}
    bench_others.add(others, "x", "deep_gemm", lambda _: 1 / 0)  # type: ignore[arg-type, return-value]
    with pytest.raises(ZeroDivisionError):
        others["x"]()


def test_batches_are_compared() -> None:
    torch.manual_seed(0)
    changed = bench.batch_changes(TINY, "cpu", (1, 2, 5))
    assert set(changed) == {"fp8 gemm", "bf16 gemm", "mla decode"}
    assert changed["mla decode"] == []


def test_the_report() -> None:
    top = bench.Ceilings("GPU <1>", 3e12, 6e14, 1.2e15)
    case = next(cases(TINY, "cpu"))
    built = case.build()
    assert top.floor_s(built) == built.bytes / 3e12  # so few rows are bound by memory
    line = bench.Measured(
        case.kernel, case.shape, 1e-3, 10.0, 0.8, 2400.0, 5.0, 2.0, {"a": 12.0, "b": "refused"}
    )
    text = bench.table(top, [line], {"fp8 gemm": [3]})
    assert "3000 GB/s" in text and "| 80% |" in text and "a 12.0, b: refused" in text
    svg = bench.roofline_svg(top, [line])
    assert svg.startswith("<svg") and "GPU &lt;1&gt;" in svg and svg.count("<circle") == 1
