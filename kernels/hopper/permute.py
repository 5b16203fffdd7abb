"""Bringing rows to their experts and back, in fixed orders and without asking the host.

`assign` sorts pairs of a row and an expert by expert, then as they came; the grouped products read
and write through that order. `combine` adds the experts' results to each row in ascending order of
experts, product and sum rounded separately. References: `expert_rows_ref`, `combine_ref`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rayseek.kernels.hopper.fp8_gemm import WIDE_ROWS, Tiles
from rayseek.kernels.hopper.offline import Variant

SCAN, TILE_BLOCK, COLUMNS = 1024, 32, 1024


class Assignment(NamedTuple):
    """Pairs sorted by expert. pair_S: which pair each is; row_S: its row; used [1]: how many."""

    pair_S: Tensor
    row_S: Tensor
    used: Tensor
    tiles: Tiles


@triton.jit
def sort_kernel(
    experts, rows, pair_out, row_out, bounds, n, E, K: tl.constexpr, BLOCK: tl.constexpr
):
    """Program e writes expert e's pairs, after those of lower experts. K: 0, or pairs of a row."""
    expert = tl.program_id(0)
    lower = 0
    for start in range(0, n, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        other = tl.load(experts + pair, pair < n, other=E)
        lower += tl.sum(((other >= 0) & (other < expert)).to(tl.int32), axis=0)
    tl.store(bounds + expert, lower)
    for start in range(0, n, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        mine = tl.load(experts + pair, pair < n, other=E) == expert
        flag = mine.to(tl.int32)
        at = lower + tl.cumsum(flag, axis=0) - 1
        tl.store(pair_out + at, pair, mine)
        if K:
            tl.store(row_out + at, pair // K, mine)
        else:
            tl.store(row_out + at, tl.load(rows + pair, mine, other=0), mine)
        lower += tl.sum(flag, axis=0)
    if expert == E - 1:
        tl.store(bounds + E, lower)


@triton.jit
def tiles_kernel(
    bounds, tile_expert, tile_first, tile_stop, count, E, BT: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of each expert cut into tiles of BT; what is left of the table is -1."""
    e = tl.arange(0, BLOCK_E)
    begin = tl.load(bounds + e, e < E, other=0)
    stop = tl.load(bounds + e + 1, e < E, other=0)
    tiles = (stop - begin + BT - 1) // BT
    ends = tl.cumsum(tiles, axis=0)
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    before = (ends[None, :] <= tile[:, None]) & (e < E)[None, :]
    expert = tl.sum(before.to(tl.int32), axis=1)
    earlier = tl.sum(tl.where(before, tiles[None, :], 0), axis=1)
    mine = e[None, :] == expert[:, None]
    first = tl.sum(tl.where(mine, begin[None, :], 0), axis=1) + (tile - earlier) * BT
    last = tl.sum(tl.where(mine, stop[None, :], 0), axis=1)
    used = expert < E
    tl.store(tile_expert + tile, tl.where(used, expert, -1), tile < count)
    tl.store(tile_first + tile, tl.where(used, first, 0), tile < count)
    tl.store(tile_stop + tile, tl.where(used, tl.minimum(first + BT, last), 0), tile < count)


@triton.jit
def gather_kernel(
    x, x_scale, row, used, out, out_scale, T, S, K, BLOCK: tl.constexpr, BLOCK_G: tl.constexpr
):
    """Row s of the output is row[s] of x, with its scales."""
    s = tl.program_id(0)
    if s >= tl.load(used):
        return
    source = tl.load(row + s).to(tl.int64)
    part = tl.program_id(1)
    column = part * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + source * K + column, column < K)
    tl.store(out + s.to(tl.int64) * K + column, value, column < K)
    group = part * BLOCK_G + tl.arange(0, BLOCK_G)
    inside = group < tl.cdiv(K, 128)
    tl.store(out_scale + group * S + s, tl.load(x_scale + group * T + source, inside), inside)


@triton.jit
def combine_kernel(
    y, index, weights, into, stride, D, K: tl.constexpr, INDEXED: tl.constexpr, BLOCK: tl.constexpr
):
    """into[t] += weights[t, k] * y[index[t, k]], k ascending; without an index y[t * K + k]."""
    t = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < D
    target = into + t.to(tl.int64) * stride + column
    value = tl.load(target, inside, other=0.0)
    for k in tl.static_range(K):
        at = t * K + k
        source = tl.load(index + at).to(tl.int64) if INDEXED else at.to(tl.int64)
        product = tl.load(y + source * D + column, inside, other=0.0).to(tl.float32)
        value = value + product * tl.load(weights + at)
    tl.store(target, value, inside)


def tile_rows(pairs: int, experts: int, largest: int) -> int:
    """Tile for the average number of rows of an expert, as if all were hit alike."""
    average: int = triton.next_power_of_2(pairs // experts)
    return min(max(average, 16), largest)


def assign(
    pair_expert: Tensor, experts: int, rows: Tensor | int, largest: int = WIDE_ROWS
) -> Assignment:
    """Sort int32 experts [N] of pairs, of which those outside 0..experts-1 are left out.

    rows: int32 [N], the row of each pair; or how many pairs, side by side, each row has.
    largest: rows of a tile, at most.
    """
    n, device = len(pair_expert), pair_expert.device
    order = torch.empty(2, n, dtype=torch.int32, device=device)
    bounds = torch.empty(experts + 1, dtype=torch.int32, device=device)
    size = tile_rows(n, experts, largest)
    count = min(n, experts + n // size)  # most tiles that n rows can make
    table = torch.empty(3, count, dtype=torch.int32, device=device)
    per_row = rows if isinstance(rows, int) else 0
    sort_kernel[(experts,)](
        pair_expert, None if per_row else rows, order[0], order[1], bounds, n, experts, per_row,
        SCAN, num_warps=4,
    )  # fmt: skip
    tiles_kernel[(triton.cdiv(count, TILE_BLOCK),)](
        bounds, table[0], table[1], table[2], count, experts, size,
        triton.next_power_of_2(experts), TILE_BLOCK, num_warps=4,
    )  # fmt: skip
    tiles = Tiles(table[0], table[1], table[2], size)
    return Assignment(order[0], order[1], bounds[experts:], tiles)


def gather(x: Tensor, x_scale: Tensor, to: Assignment) -> tuple[Tensor, Tensor]:
    """Quantised rows x [T, K], x_scale [K/128, T] in sorted order: [S, K], [K/128, S]."""
    (rows, k), n = x.shape, len(to.row_S)
    out = torch.empty(n, k, dtype=x.dtype, device=x.device)
    scale = torch.empty(len(x_scale), n, device=x.device)
    gather_kernel[(n, triton.cdiv(k, COLUMNS))](
        x, x_scale, to.row_S, to.used, out, scale, rows, n, k, COLUMNS, COLUMNS // 128,
        num_warps=4,
    )  # fmt: skip
    return out, scale


def combine(y: Tensor, weights: Tensor, into: Tensor, index: Tensor | None = None) -> None:
    """As `combine_ref`, in place; without an index the products of a row lie side by side in y.

    y [M, D] bfloat16 or float32; weights float32 [T, K]; into float32 [T, D]; index int32 [T, K].
    """
    (rows, d), top_k = into.shape, weights.shape[1]
    if rows:
        combine_kernel[(rows, triton.cdiv(d, COLUMNS))](
            y, index, weights, into, into.stride(0), d, top_k, index is not None, COLUMNS,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def variants() -> Iterator[Variant]:
    """For the gate; see `offline.py`."""
    types = dict.fromkeys(
        ("experts", "rows", "pair_out", "row_out", "bounds", "tile_expert", "tile_first",
         "tile_stop", "row", "used", "index"), "*i32",
    ) | {
        "x": "*fp8e4nv", "x_scale": "*fp32", "out": "*fp8e4nv", "out_scale": "*fp32",
        "y": "*bf16", "weights": "*fp32", "into": "*fp32",
    }  # fmt: skip
    loose = ("n", "E", "T", "S", "count", "used", "tile_first", "tile_stop", "row_out", "row")

    def variant(name: str, kernel: Any, *, fused: bool = True, **constants: object) -> Variant:
        options = None if fused else {"enable_fp_fusion": False}
        return Variant(name, kernel, types, constants, 4, unaligned=loose, options=options)

    yield variant("expert sort", sort_kernel, K=8, BLOCK=SCAN)
    yield variant("expert gather", gather_kernel, BLOCK=COLUMNS, BLOCK_G=COLUMNS // 128)
    for indexed in (False, True):
        name = f"expert combine{' indexed' * indexed}"
        yield variant(name, combine_kernel, fused=False, K=8, INDEXED=indexed, BLOCK=COLUMNS)
    for size in (16, 128):
        name = f"expert tiles {size}"
        yield variant(name, tiles_kernel, BT=size, BLOCK_E=256, BLOCK=TILE_BLOCK)
