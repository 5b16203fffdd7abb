"""Bringing rows to their experts and back, in fixed orders and without asking the host.

`assign` sorts the (row, choice) pairs by expert, then by row; `gather` copies quantised rows into
that order; `combine` adds an expert's results to each row in ascending order of experts, product
and sum rounded separately. Reference: `experts_ref`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rayseek.kernels.hopper.fp8_gemm import WIDE_ROWS, Tiles
from rayseek.kernels.hopper.offline import Variant

SCAN, TILE_BLOCK, COLUMNS = 1024, 32, 1024


class Assignment(NamedTuple):
    """Where each pair goes. place_TK: its row among the sorted ones. row_S: whose row each is."""

    place_TK: Tensor
    row_S: Tensor
    tiles: Tiles


@triton.jit
def sort_kernel(ids, place, row, bounds, n, E, K: tl.constexpr, BLOCK: tl.constexpr):
    """Program e writes the places of expert e's pairs, after those of lower experts."""
    expert = tl.program_id(0)
    lower = 0
    for start in range(0, n, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        lower += tl.sum((tl.load(ids + pair, pair < n, other=E) < expert).to(tl.int32), axis=0)
    tl.store(bounds + expert, lower)
    for start in range(0, n, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        mine = tl.load(ids + pair, pair < n, other=E) == expert
        flag = mine.to(tl.int32)
        at = lower + tl.cumsum(flag, axis=0) - 1
        tl.store(place + pair, at, mine)
        tl.store(row + at, pair // K, mine)
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
    y, ids, weights, place, into, stride, E, D, K: tl.constexpr, BLOCK: tl.constexpr
):
    """into[t] += weights[t, k] * y[place[t, k]], k ascending; experts not here are left out."""
    t = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < D
    target = into + t.to(tl.int64) * stride + column
    value = tl.load(target, inside, other=0.0)
    for k in tl.static_range(K):
        here = tl.load(ids + t * K + k)
        if (here >= 0) & (here < E):
            source = y + tl.load(place + t * K + k).to(tl.int64) * D + column
            product = tl.load(source, inside, other=0.0).to(tl.float32) * tl.load(
                weights + t * K + k
            )
            value = value + product
    tl.store(target, value, inside)


def tile_rows(rows: int, top_k: int, experts: int) -> int:
    """Tile for the average number of rows of an expert, as if all were hit alike."""
    average: int = triton.next_power_of_2(rows * top_k // experts)
    return min(max(average, 16), WIDE_ROWS)


def assign(ids: Tensor, experts: int) -> Assignment:
    """Places for int32 ids [T, K] among `experts`; ids outside 0..experts-1 get none."""
    rows, top_k = ids.shape
    n, device = rows * top_k, ids.device
    place = torch.empty(rows, top_k, dtype=torch.int32, device=device)
    row = torch.empty(n, dtype=torch.int32, device=device)
    bounds = torch.empty(experts + 1, dtype=torch.int32, device=device)
    size = tile_rows(rows, top_k, experts)
    count = min(n, experts + n // size)  # most tiles that n rows can make
    table = torch.empty(3, count, dtype=torch.int32, device=device)
    sort_kernel[(experts,)](ids, place, row, bounds, n, experts, top_k, SCAN, num_warps=4)
    tiles_kernel[(triton.cdiv(count, TILE_BLOCK),)](
        bounds, table[0], table[1], table[2], count, experts, size,
        triton.next_power_of_2(experts), TILE_BLOCK, num_warps=4,
    )  # fmt: skip
    return Assignment(place, row, Tiles(table[0], table[1], table[2], size, bounds[experts:]))


def gather(x: Tensor, x_scale: Tensor, to: Assignment) -> tuple[Tensor, Tensor]:
    """Quantised rows x [T, K], x_scale [K/128, T] in sorted order: [S, K], [K/128, S]."""
    (rows, k), n = x.shape, len(to.row_S)
    out = torch.empty(n, k, dtype=x.dtype, device=x.device)
    scale = torch.empty(len(x_scale), n, device=x.device)
    gather_kernel[(n, triton.cdiv(k, COLUMNS))](
        x, x_scale, to.row_S, to.tiles.used, out, scale, rows, n, k, COLUMNS, COLUMNS // 128,
        num_warps=4,
    )  # fmt: skip
    return out, scale


def combine(
    y: Tensor, ids: Tensor, weights: Tensor, to: Assignment, experts: int, into: Tensor
) -> None:
    """into [T, D] float32 += the weighted results y [S, D] of its experts, in their order."""
    rows, d = into.shape
    combine_kernel[(rows, triton.cdiv(d, COLUMNS))](
        y, ids, weights, to.place_TK, into, into.stride(0), experts, d, ids.shape[1], COLUMNS,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def _variants() -> list[Variant]:
    types = {
        "ids": "*i32", "place": "*i32", "row": "*i32", "bounds": "*i32", "tile_expert": "*i32",
        "tile_first": "*i32", "tile_stop": "*i32", "x": "*fp8e4nv", "x_scale": "*fp32",
        "used": "*i32", "out": "*fp8e4nv", "out_scale": "*fp32", "y": "*bf16",
        "weights": "*fp32", "into": "*fp32",
    }  # fmt: skip
    loose = ("n", "E", "T", "S", "count", "used", "tile_first", "tile_stop")
    moves = {"BLOCK": COLUMNS, "BLOCK_G": COLUMNS // 128}
    found = [
        Variant("expert sort", sort_kernel, types, {"K": 8, "BLOCK": SCAN}, 4, unaligned=loose),
        Variant("expert gather", gather_kernel, types, moves, 4, unaligned=loose),
        Variant("expert combine", combine_kernel, types, {"K": 8, "BLOCK": COLUMNS}, 4,
                unaligned=loose, options={"enable_fp_fusion": False}),
    ]  # fmt: skip
    for size in (16, 128):
        constants = {"BT": size, "BLOCK_E": 256, "BLOCK": TILE_BLOCK}
        found.append(
            Variant(f"expert tiles {size}", tiles_kernel, types, constants, 4, unaligned=loose)
        )
    return found


VARIANTS = _variants()
