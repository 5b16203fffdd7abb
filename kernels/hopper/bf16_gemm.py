"""bfloat16 matrix product for what the checkpoint keeps in bfloat16: head, router gate, kv_b.

out[b, t, n] = sum over k of x[b, t, k] * w[b, n, k], float32 sums in ascending steps of 64 for any
tile shape; b is a batch of matrices (the heads of MLA's absorbed projections) or 1. As in
`fp8_gemm`, weights are the rows of the tensor-core tile and tokens its columns.
Reference: `linear_ref`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from rayseek.kernels.hopper.offline import Variant

STEP = 64  # of k
WEIGHTS = 128  # rows of a tile
TILES = {16: (4, 6), 32: (4, 6), 64: (4, 5), 128: (8, 4)}  # its tokens: warps, stages


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


def bf16_matmul(x: Tensor, w: Tensor, residual: Tensor | None = None) -> Tensor:
    """x [T, K] @ w [N, K].T (+ residual) -> [T, N], all but residual and output bfloat16."""
    out = torch.empty(len(x), len(w), device=x.device)
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
    tokens = min(max(triton.next_power_of_2(rows), 16), 128)
    warps, stages = TILES[tokens]
    bf16_kernel[(triton.cdiv(rows, tokens), triton.cdiv(n, WEIGHTS), batch)](
        x, w, residual, out, rows, n, k, x.stride(1), x.stride(0), out.stride(1), out.stride(0),
        residual.stride(0) if residual is not None else 0,
        residual is not None, k % STEP == 0, WEIGHTS, tokens, STEP, num_warps=warps,
        num_stages=stages,
    )  # fmt: skip


def variants() -> Iterator[Variant]:
    """For the gate; see `offline.py`."""
    for out, kind in (("fp32", "gemm"), ("bf16", "batched")):
        types = {"x": "*bf16", "w": "*bf16", "residual": "*fp32", "out": f"*{out}"}
        for tokens, (warps, stages) in TILES.items():
            sizes = {"RESIDUAL": False, "EVEN_K": True, "BN": WEIGHTS, "BT": tokens, "BK": STEP}
            yield Variant(f"bf16 {kind} {WEIGHTS}x{tokens}", bf16_kernel, types, sizes, warps,
                          stages, wgmma=True, unaligned=("T",))  # fmt: skip
