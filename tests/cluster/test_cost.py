"""The cost model against a table of bounds made apart from it, and against published systems."""

from __future__ import annotations

import pytest

from rayseek.cluster.cost import DEVICES, PUBLISHED, Cost
from rayseek.model.official import DEEPSEEK_V3

# Bounds in ms at the best published kernels: device, ranks, batch, context.
BOUNDS = [
    ("H800", 16, 32, 1024, 24.0), ("H800", 32, 128, 1024, 24.2), ("H800", 144, 1, 4989, 9.0),
    ("H800", 144, 32, 4989, 13.0), ("H800", 320, 128, 4989, 31.5), ("H200", 8, 32, 4989, 31.6),
    ("H200", 16, 128, 4989, 32.7), ("H200", 32, 32, 32768, 37.5), ("H200", 72, 1, 131072, 10.6),
]  # fmt: skip
# Published tokens/s of a GPU: ranks, batch, context, rows a sequence, tokens kept a step.
DECODE = {
    "DeepSeek's profile, EP128": ("H800", 128, 128, 4096, 2, 1.6, 18598 / 8),
    "SGLang, EP72, 2k": ("H100", 72, 256, 2000, 1, 1.0, 22282 / 8),
    "SGLang, EP72, 4k with MTP": ("H100", 72, 128, 4000, 2, 1.6, 17373 / 8),
    "StepFun of DeepSeek-V3": ("H800", 128, 116, 4096, 1, 1.0, 2324),
}
PREFILL = {
    "DeepSeek's profile, EP32": ("H800", 4096, 62713 / 8),
    "SGLang, EP32, 4k": ("H100", 4096, 50302 / 8),
    "SGLang, EP32, 1k": ("H100", 1024, 57674 / 8),
}


def cost(device: str, ranks: int) -> Cost:
    return Cost(DEEPSEEK_V3, DEVICES[device], ranks, -(-256 // ranks))


@pytest.mark.parametrize("case", BOUNDS, ids=str)
def test_bounds(case: tuple[str, int, int, int, float]) -> None:
    device, ranks, batch, context, milliseconds = case
    step = cost(device, ranks).decode(batch, context)
    assert max(step.compute, step.network) * 1e3 == pytest.approx(milliseconds, abs=0.06)


@pytest.mark.parametrize("name", DECODE)
def test_published_decoding_within_15_percent(name: str) -> None:
    device, ranks, batch, context, rows, kept, measured = DECODE[name]
    step = cost(device, ranks).decode(batch, context, rows)
    assert batch * kept / step.seconds == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("name", PREFILL)
def test_published_prompts_within_15_percent(name: str) -> None:
    device, context, measured = PREFILL[name]
    step = cost(device, 32).prefill(16384, context)
    assert 16384 / step.seconds == pytest.approx(measured, rel=0.15)


def test_what_limits() -> None:
    assert cost("H800", 144).decode(1, 1024).limit == "memory"
    assert cost("H800", 144).decode(256, 1024).limit == "network"
    assert cost("H800", 32).prefill(16384, 131072).limit == "operations"
    assert PUBLISHED.decode < 1 and PUBLISHED.prefill < 1
