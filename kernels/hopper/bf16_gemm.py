"""bfloat16 matrix product for what the checkpoint keeps in bfloat16: head, router gate, kv_b.

out[b, t, n] = sum over k of x[b, t, k] * w[b, n, k], float32 sums in ascending steps of 64 for any
tile shape; b is a batch of matrices (the heads of MLA's absorbed projections) or 1. As in
`fp8_gemm`, weights are the rows of the tensor-core tile and tokens its columns.
Reference: `linear_ref`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rayseek.kernels.hopper.offline import Variant

STEP = 64  # of k


class Tile(NamedTuple):
    """Weight rows x tokens of a program."""

    weights: int
    tokens: int
    warps: int
    stages: int


TILES = {
    16: Tile(128, 16, 4, 6), 32: Tile(128, 32, 4, 6), 64: Tile(128, 64, 4, 5),
    128: Tile(128, 128, 8, 4),
}  # fmt: skip


@triton.jit
def bf16_kernel(
    x, w, residual, out, T, N, K, x_batch, x_row, out_batch, out_row, stride_res,
    RESIDUAL: tl.constexpr, EVEN_K: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    t_in, n_in = tl.where(t < T, t, 0), tl.where(n < N, n, 0)
    k = tl.arange(0, BK)
    x_at = x + batch * x_batch + t_in.to(tl.int64)[None, :] * x_row + k[:, None]
    w_at = w + (batch * N + n_in)[:, None] * K + k[None, :]
    sum_NT = tl.zeros((BN, BT), tl.float32)
    for start in range(0, K, BK):
        if EVEN_K:
            w_tile, x_tile = tl.load(w_at), tl.load(x_at)
        else:
            w_tile = tl.load(w_at, k[None, :] < K - start, other=0.0)
            x_tile = tl.load(x_at, k[:, None] < K - start, other=0.0)
        sum_NT = tl.dot(w_tile, x_tile, sum_NT)
        w_at += BK
        x_at += BK
    inside = (n[:, None] < N) & (t[None, :] < T)
    row = t.to(tl.int64)[None, :]
    if RESIDUAL:
        sum_NT += tl.load(residual + row * stride_res + n[:, None], inside, other=0.0)
    target = out + batch * out_batch + row * out_row + n[:, None]
    tl.store(target, sum_NT.to(out.dtype.element_ty), inside)


def bf16_matmul(
    x: Tensor, w: Tensor, residual: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """x [T, K] @ w [N, K].T (+ residual) -> [T, N], all but residual and output bfloat16."""
    out = torch.empty(len(x), len(w), dtype=dtype, device=x.device)
    _launch(x[:, None], w[None], residual, out[:, None])
    return out


def bf16_batched(x: Tensor, w: Tensor, out: Tensor) -> None:
    """out[t, b] = w[b] @ x[t, b]: x [T, B, K], w [B, N, K], out [T, B, N], last dim contiguous."""
    _launch(x, w, None, out)


def _launch(x: Tensor, w: Tensor, residual: Tensor | None, out: Tensor) -> None:
    rows, batch, k = x.shape
    n = w.shape[1]
    if not rows:
        return
    tile = TILES[min(max(triton.next_power_of_2(rows), 16), 128)]
    bf16_kernel[(triton.cdiv(rows, tile.tokens), triton.cdiv(n, tile.weights), batch)](
        x, w, residual, out, rows, n, k, x.stride(1), x.stride(0), out.stride(1), out.stride(0),
        residual.stride(0) if residual is not None else 0,
        residual is not None, k % STEP == 0, tile.weights, tile.tokens, STEP,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _variants() -> list[Variant]:
    found = []
    for out, kind in (("fp32", "gemm"), ("bf16", "batched")):
        types = {"x": "*bf16", "w": "*bf16", "residual": "*fp32", "out": f"*{out}"}
        for tile in TILES.values():
            constants = {"RESIDUAL": False, "EVEN_K": True, "BN": tile.weights, "BT": tile.tokens,
                         "BK": STEP}  # fmt: skip
            found.append(
                Variant(
                    f"bf16 {kind} {tile.weights}x{tile.tokens}",
                    bf16_kernel,
                    types,
                    constants,
                    tile.warps,
                    tile.stages,
                    wgmma=True,
                    unaligned=("T",),
                )  # fmt: skip
            )
    return found


VARIANTS = _variants()
