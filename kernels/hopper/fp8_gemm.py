"""Block-FP8 matrix product: e4m3 activations (1x128 scales) times e4m3 weights (128x128 scales).

out[t, n] = sum over blocks k of (x_k . w_k) * (x_scale * w_scale), each block in the tensor cores,
their sum in float32 registers, k ascending: the same operations for every tile shape, so a row's
result does not depend on how many rows there are. Two forms:

- swapped: weights are the 64 or 128 rows of the tensor-core tile and tokens its 16..64 columns,
  since Hopper's wgmma has no tile of fewer than 64 rows; for decoding, where bytes count;
- wide: 128 x 128 tiles fed by TMA, for prompts, where arithmetic counts.

Both also multiply groups of rows by a matrix of their own (the routed experts): `Tiles` then says
which rows each tile has and which expert's they are. Reference: dequantised values, `linear_ref`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rayseek.kernels.fp8 import BLOCK
from rayseek.kernels.hopper.offline import Variant


class Tiles(NamedTuple):
    """Row tiles of a grouped product, int32 each: which expert (-1: no tile), rows first..stop.

    The rows of an expert may lie side by side with the next one's or in a block of fixed size.
    """

    expert: Tensor
    first: Tensor
    stop: Tensor
    rows: int  # most rows of a tile: 16, 32, 64 (swapped) or 128 (wide)


WIDE_ROWS = 128  # rows of a tile of the wide form, and from how many rows on it is used
WIDE_WARPS, WIDE_STAGES, WIDE_SWIZZLE = 8, 4, 8
STREAMING_BLOCKS = 132  # fewer tiles of 128 weight rows than processors: take tiles of 64
WARPS = 4  # of the swapped form, and its stages by weight rows and tokens of a tile
STAGES = {(64, 16): 8, (64, 32): 8, (64, 64): 6, (128, 16): 6, (128, 32): 6, (128, 64): 5}


@triton.jit
def swapped_kernel(
    x, x_scale, w, w_scale, residual, out, tile_expert, tile_first, tile_stop, scatter, gather,
    T, N, K, stride_res, GROUPED: tl.constexpr, RESIDUAL: tl.constexpr, SCATTER: tl.constexpr,
    GATHER: tl.constexpr, EVEN_K: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)  # fastest, so that tiles of the same weights share them in L2
    blocks = tl.cdiv(K, 128)
    first, stop = tile * BT, T
    if GROUPED:
        expert = tl.load(tile_expert + tile)
        if expert < 0:
            return
        first, stop = tl.load(tile_first + tile), tl.load(tile_stop + tile)
        w += expert.to(tl.int64) * N * K
        w_scale += expert.to(tl.int64) * tl.cdiv(N, 128) * blocks
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    t = first + tl.arange(0, BT)
    n_in = tl.where(n < N, n, 0)  # rows outside are computed from row 0 and not stored
    t_in = tl.where(t < stop, t, first)
    k = tl.arange(0, 128)
    w_at = w + n_in.to(tl.int64)[:, None] * K + k[None, :]
    if GATHER:
        t_in = tl.load(gather + t_in)
    x_at = x + t_in.to(tl.int64)[None, :] * K + k[:, None]
    w_scale_at = w_scale + (tl.program_id(1) * BN // 128) * blocks
    x_scale_at = x_scale + t_in
    sum_NT = tl.zeros((BN, BT), tl.float32)
    scale = tl.load(x_scale_at) * tl.load(w_scale_at)
    for block in range(0, blocks):
        w_scale_at += 1  # the next block's scales: only tiles are prefetched by the compiler
        x_scale_at += T
        more = block + 1 < blocks
        next_x, next_w = tl.load(x_scale_at, more), tl.load(w_scale_at, more)
        if EVEN_K:
            w_tile, x_tile = tl.load(w_at), tl.load(x_at)
        else:
            rest = K - block * 128
            w_tile = tl.load(w_at, k[None, :] < rest, other=0.0)
            x_tile = tl.load(x_at, k[:, None] < rest, other=0.0)
        sum_NT += tl.dot(w_tile, x_tile) * scale[None, :]
        scale = next_x * next_w
        w_at += 128
        x_at += 128
    inside = (n[:, None] < N) & (t[None, :] < stop)
    row = (tl.load(scatter + t, t < stop, other=0) if SCATTER else t).to(tl.int64)[None, :]
    if RESIDUAL:
        sum_NT += tl.load(residual + row * stride_res + n[:, None], inside, other=0.0)
    tl.store(out + row * N + n[:, None], sum_NT.to(out.dtype.element_ty), inside)


@triton.jit
def wide_kernel(
    x, x_scale, w, w_scale, residual, out, tile_expert, tile_first, tile_stop, scatter,
    T, N, K, stride_res, GROUPED: tl.constexpr, RESIDUAL: tl.constexpr, SCATTER: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SWIZZLE: tl.constexpr,
):  # fmt: skip
    blocks = K // 128
    row_tiles, n_tiles = tl.num_programs(0), tl.num_programs(1)
    pid = tl.program_id(1) * row_tiles + tl.program_id(0)
    band = SWIZZLE * n_tiles  # neighbours share weights and rows in L2
    top = (pid // band) * SWIZZLE
    height = min(row_tiles - top, SWIZZLE)
    tile, n_tile = top + (pid % band) % height, (pid % band) // height
    first, stop, w_row = tile * BM, T, n_tile * BN
    w_scale_at = w_scale + n_tile * BN // 128 * blocks
    if GROUPED:
        expert = tl.load(tile_expert + tile)
        if expert < 0:
            return
        first, stop = tl.load(tile_first + tile), tl.load(tile_stop + tile)
        w_row += expert * N
        w_scale_at += expert * tl.cdiv(N, 128) * blocks
    t = first + tl.arange(0, BM)
    x_scale_at = x_scale + tl.where(t < stop, t, first)
    sum_TN = tl.zeros((BM, BN), tl.float32)
    scale = tl.load(x_scale_at) * tl.load(w_scale_at)
    for block in range(0, blocks):
        w_scale_at += 1
        x_scale_at += T
        more = block + 1 < blocks
        next_x, next_w = tl.load(x_scale_at, more), tl.load(w_scale_at, more)
        x_tile = x.load([first, block * 128])
        w_tile = w.load([w_row, block * 128])
        sum_TN += tl.dot(x_tile, w_tile.T) * scale[:, None]
        scale = next_x * next_w
    n = n_tile * BN + tl.arange(0, BN)
    inside = (t[:, None] < stop) & (n[None, :] < N)
    row = (tl.load(scatter + t, t < stop, other=0) if SCATTER else t).to(tl.int64)[:, None]
    if RESIDUAL:
        sum_TN += tl.load(residual + row * stride_res + n[None, :], inside, other=0.0)
    tl.store(out + row * N + n[None, :], sum_TN.to(out.dtype.element_ty), inside)


def fp8_matmul(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, residual: Tensor | None = None
) -> Tensor:
    """x @ w.T (+ residual float32) -> [T, N]: bfloat16, or float32 with a residual.

    x e4m3 [T, K], x_scale [K/128, T]; w e4m3 [N, K], w_scale [N/128, K/128].
    """
    rows, n = len(x), len(w)
    kind = torch.bfloat16 if residual is None else torch.float32
    out = torch.empty(rows, n, dtype=kind, device=x.device)
    if not rows:
        return out
    size = min(max(triton.next_power_of_2(rows), 16), WIDE_ROWS)
    if size == WIDE_ROWS and can_be_wide(n, x.shape[1], grouped=False):
        _wide(x, x_scale, w, w_scale, residual, out, triton.cdiv(rows, size), None, None)
    else:
        size = min(size, 64)
        count = triton.cdiv(rows, size)
        _swapped(x, x_scale, w, w_scale, residual, out, size, count, None, None, None)
    return out


def grouped_fp8_matmul(
    x: Tensor,
    x_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    tiles: Tiles,
    out: Tensor,
    rows_from: Tensor | None = None,
    rows_to: Tensor | None = None,
) -> None:
    """out[s] = x[s] @ w[its expert].T for the rows s of all tiles; other rows stay as they are.

    x, x_scale as for `fp8_matmul`; w [E, N, K], w_scale [E, N/128, K/128]; out [S, N] bfloat16.
    rows_from: int32, x[rows_from[s]] instead of x[s] (not with tiles of 128). rows_to: int32,
    out[rows_to[s]] instead of out[s].
    """
    count = len(tiles.expert)
    if tiles.rows == WIDE_ROWS:
        assert rows_from is None and can_be_wide(w.shape[1], x.shape[1], grouped=True)
        _wide(x, x_scale, w, w_scale, None, out, count, tiles, rows_to)
    else:
        _swapped(x, x_scale, w, w_scale, None, out, tiles.rows, count, tiles, rows_from, rows_to)


def can_be_wide(n: int, k: int, grouped: bool) -> bool:
    """Whether the wide form takes such weights: TMA loads whole blocks."""
    return k % BLOCK == 0 and not (grouped and n % BLOCK)


def _wide(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, residual: Tensor | None, out: Tensor,
    count: int, tiles: Tiles | None, rows_to: Tensor | None,
) -> None:  # fmt: skip
    n, k = w.shape[-2:]
    table = tiles[:3] if tiles else (None, None, None)
    wide_kernel[(count, triton.cdiv(n, WIDE_ROWS))](
        TensorDescriptor.from_tensor(x, [WIDE_ROWS, BLOCK]), x_scale,
        TensorDescriptor.from_tensor(w.view(-1, k), [WIDE_ROWS, BLOCK]), w_scale,
        residual, out, *table, rows_to, len(x), n, k,
        residual.stride(0) if residual is not None else 0,
        tiles is not None, residual is not None, rows_to is not None,
        WIDE_ROWS, WIDE_ROWS, WIDE_SWIZZLE, num_warps=WIDE_WARPS, num_stages=WIDE_STAGES,
    )  # fmt: skip


def _swapped(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, residual: Tensor | None, out: Tensor,
    tokens: int, count: int, tiles: Tiles | None, rows_from: Tensor | None, rows_to: Tensor | None,
) -> None:  # fmt: skip
    n, k = w.shape[-2:]
    table = tiles[:3] if tiles else (None, None, None)
    # Small tiles where large ones would leave processors idle.
    weights = 128 if n // 128 * (len(w) if tiles else 1) >= STREAMING_BLOCKS else 64
    swapped_kernel[(count, triton.cdiv(n, weights))](
        x, x_scale, w, w_scale, residual, out, *table, rows_to, rows_from, len(x), n, k,
        residual.stride(0) if residual is not None else 0,
        tiles is not None, residual is not None, rows_to is not None, rows_from is not None,
        k % BLOCK == 0, weights, tokens, num_warps=WARPS, num_stages=STAGES[weights, tokens],
    )  # fmt: skip


def variants() -> Iterator[Variant]:
    """For the gate; see `offline.py`."""
    types = {
        "x": "*fp8e4nv", "x_scale": "*fp32", "w": "*fp8e4nv", "w_scale": "*fp32",
        "residual": "*fp32", "out": "*bf16", "tile_expert": "*i32", "tile_first": "*i32",
        "tile_stop": "*i32", "scatter": "*i32", "gather": "*i32",
    }  # fmt: skip
    loose = ("T", "tile_first", "tile_stop", "scatter", "gather")
    plain = {"GROUPED": False, "RESIDUAL": False, "SCATTER": False}
    residual, up = plain | {"RESIDUAL": True}, plain | {"GROUPED": True}
    down = up | {"SCATTER": True}
    uses = {"gemm": plain, "gemm residual": residual, "experts up": up, "experts down": down}
    tile = f"tensordesc<fp8e4nv[{WIDE_ROWS}, {BLOCK}]>"
    for use, flags in uses.items():
        kinds = types | ({"out": "*fp32"} if flags["RESIDUAL"] else {})
        for (weights, tokens), stages in STAGES.items():
            rest = {"GATHER": flags is up, "EVEN_K": True, "BN": weights, "BT": tokens}
            name = f"fp8 {use} {weights}x{tokens}"
            yield Variant(name, swapped_kernel, kinds, flags | rest, WARPS, stages, wgmma=True,
                          unaligned=loose)  # fmt: skip
        sizes = {"BM": WIDE_ROWS, "BN": WIDE_ROWS, "SWIZZLE": WIDE_SWIZZLE}
        yield Variant(f"fp8 {use} wide", wide_kernel, kinds | {"x": tile, "w": tile}, flags | sizes,
                      WIDE_WARPS, WIDE_STAGES, wgmma=True, tma=True, unaligned=loose)  # fmt: skip
