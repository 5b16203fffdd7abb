"""Quantisation, norm and block-FP8 products in the interpreter, against float64 values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rayseek.kernels.fp8 import (
    dequantise_ref,
    dequantise_rows_ref,
    quantise_blocks_ref,
    quantise_rows_ref,
)
from rayseek.kernels.hopper import fp8_gemm, quantise
from rayseek.kernels.ops import Norm
from rayseek.kernels.rms_norm import rms_norm_ref


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(actual: Tensor, expected: Tensor, bits: int) -> None:
    """Within 2^-bits of each value, and as much of the largest one's hundredth part."""
    bound = (expected.abs() + expected.abs().max() / 100) * 2.0**-bits
    error = (actual.double() - expected.double()).abs()
    assert bool((error <= bound).all()), f"{(error / bound).max():.2f} of what is allowed"


def same_bits(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(a[0].view(torch.uint8), b[0].view(torch.uint8))
    assert torch.equal(a[1], b[1])


@given(rows=st.integers(0, 3), k=st.integers(1, 1300), wide=st.booleans())
@settings(max_examples=15)
def test_quantisation_is_the_reference(rows: int, k: int, wide: bool) -> None:
    x = random(rows, k) * 30
    x[:, :5] = 0
    x = x if wide else x.bfloat16()
    same_bits(quantise.quantise(x), quantise_rows_ref(x))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_values_too_small_for_a_scale_become_zeros() -> None:
    """As where gates are so low that a product underflows; 0 / 0 would be NaN."""
    x = torch.zeros(2, 256)
    x[0, 3], x[0, 200], x[1, 7] = 1e-44, 1.0, 5e-39
    got = quantise.quantise(x)
    same_bits(got, quantise_rows_ref(x))
    assert dequantise_rows_ref(*got).count_nonzero() == 1
    gates, up = torch.full((1, 128), -86.0), torch.full((1, 128), 1e-9)
    gates[0, 5] = -100
    gated = quantise.quantise(torch.cat([gates, up], 1).bfloat16(), gated=True)
    assert dequantise_rows_ref(*gated).count_nonzero() == 0


def test_quantisation_after_silu_keeps_values_and_spares_unused_rows() -> None:
    x = random(4, 400).bfloat16()
    gate, up = x.float().chunk(2, dim=1)
    expected = torch.nn.functional.silu(gate) * up
    data, scale = quantise.quantise(x, gated=True)
    close(dequantise_rows_ref(data, scale), expected, 4)
    part, _ = quantise.quantise(x, gated=True, rows_used=torch.tensor([3], dtype=torch.int32))
    assert torch.equal(part[:3].float(), data[:3].float())


@pytest.mark.parametrize("k", [64, 200, 1536])
def test_norm_alone_and_quantised(k: int) -> None:
    wide = random(3, k + 16) * 4
    x, norm = wide[:, :k], Norm(random(k, seed=1), 1e-6)  # rows of a slice
    expected = rms_norm_ref(x, norm)
    close(quantise.rms_norm(x, norm, torch.float32), expected, 20)
    close(quantise.rms_norm(x, norm), expected, 8)
    data, scale = quantise.rms_norm_quantised(x, norm)
    same, same_scale = quantise_rows_ref(expected)
    torch.testing.assert_close(scale, same_scale)
    assert (data.float() != same.float()).float().mean() < 0.01  # a rounding may go the other way


@pytest.mark.parametrize(
    "rows, n, k, residual",
    [(1, 128, 256, False), (5, 200, 300, True), (20, 130, 128, False), (40, 64, 64, False),
     (70, 136, 256, True), (130, 256, 256, False), (129, 160, 128, True)],
)  # fmt: skip
def test_product_of_blocks(rows: int, n: int, k: int, residual: bool) -> None:
    x, x_scale = quantise_rows_ref(random(rows, k))
    w = quantise_blocks_ref(random(n, k, seed=1) * k**-0.5)
    assert w.scale_inv is not None
    add = random(rows, n + 3, seed=2)[:, :n] if residual else None
    out = fp8_gemm.fp8_matmul(x, x_scale, w.data, w.scale_inv, add)
    expected = dequantise_rows_ref(x, x_scale).double() @ dequantise_ref(w).double().T
    assert out.dtype is (torch.float32 if residual else torch.bfloat16)
    close(out, expected if add is None else expected + add, 17 if residual else 8)


def test_a_row_does_not_depend_on_the_others() -> None:
    """The promise of both forms, as far as the interpreter's own sums allow to see it."""
    x, x_scale = quantise_rows_ref(random(130, 256))
    w = quantise_blocks_ref(random(128, 256, seed=1))
    assert w.scale_inv is not None
    full = fp8_gemm.fp8_matmul(x, x_scale, w.data, w.scale_inv)
    for rows in (1, 17, 40, 70):
        part = fp8_gemm.fp8_matmul(x[:rows], x_scale[:, :rows].contiguous(), w.data, w.scale_inv)
        close(part, full[:rows].float(), 7)


@pytest.mark.parametrize("rows", [16, 32, 128])
def test_groups_of_rows_with_a_matrix_each(rows: int) -> None:
    experts, n, k = 3, 128, 256
    x, x_scale = quantise_rows_ref(random(150, k))
    parts = [quantise_blocks_ref(random(n, k, seed=e)) for e in range(experts)]
    w = torch.stack([p.data for p in parts])
    scales = torch.stack([p.scale_inv for p in parts if p.scale_inv is not None])
    bounds = [(0, 0, 16), (0, 16, 20), (2, 20, 20 + min(rows, 100)), (-1, 0, 0)]
    if rows == 16:
        bounds[2:3] = [(2, 20 + i, 36 + i) for i in (0, 16, 32)]
    columns = [torch.tensor(c, dtype=torch.int32) for c in zip(*bounds, strict=True)]
    tiles = fp8_gemm.Tiles(*columns, rows=rows)
    out = torch.zeros(150, n, dtype=torch.bfloat16)
    fp8_gemm.grouped_fp8_matmul(x, x_scale, w, scales, tiles, out)
    values = dequantise_rows_ref(x, x_scale).double()
    for expert, first, stop in bounds[:-1]:
        expected = values[first:stop] @ dequantise_ref(parts[expert]).double().T
        close(out[first:stop], expected, 8)
    assert not out[bounds[-2][2] :].any()
    there = torch.randperm(150, generator=torch.Generator().manual_seed(1)).int()
    moved = torch.zeros_like(out)
    if rows < 128:
        fp8_gemm.grouped_fp8_matmul(
            x[there], x_scale[:, there].contiguous(), w, scales, tiles, moved,
            there.argsort().int(), there,
        )  # fmt: skip
    else:
        fp8_gemm.grouped_fp8_matmul(x, x_scale, w, scales, tiles, moved, None, there)
    assert torch.equal(moved[there], out)
