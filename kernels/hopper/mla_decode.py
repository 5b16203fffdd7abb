"""Absorbed MLA over paged latents: one 576-wide key per token for all heads, 512 of it the value.

A program takes 64 heads of one row (the smallest tile that wgmma has) and one split of its
sequence. Splits have a fixed length and are combined in order, so a row's result depends on its own
position alone: not on the batch, nor on whether it came in a decode step, as one of several
speculated tokens, or in a prompt. FP8 pages are multiplied in bfloat16, which holds their values
exactly. Reference: `mla_attention_ref`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rayseek.kernels.hopper.latent_cache import fp8_views
from rayseek.kernels.hopper.offline import Variant
from rayseek.kernels.kv_format import GROUP, PAGE_TOKENS, Fp8Token

SPLIT_TOKENS = 1024  # a row whose sequence fits is done in one piece
PARTS = 2048  # splits of rows that are kept at a time, and then combined: 256 MiB for V3
HEADS, WARPS, STAGES = 64, 8, 2
COMBINE_HEADS = 4


@triton.jit
def meet(score, value, highest, total, result):
    """A running softmax takes in the scores [heads, tokens] and values of some more tokens."""
    new_highest = tl.maximum(highest, tl.max(score, axis=1))
    shrink = tl.exp2(highest - new_highest)
    weight = tl.exp2(score - new_highest[:, None])
    total = total * shrink + tl.sum(weight, axis=1)
    result = tl.dot(weight.to(value.dtype), value, result * shrink[:, None])
    return new_highest, total, result


@triton.jit
def decode_kernel(
    q, latents, keys, page_table, sequence, positions, out, part, part_lse, H, scale_log2,
    table_row, splits, C: tl.constexpr, R: tl.constexpr, BLOCK_H: tl.constexpr, PAGE: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """One split of one row: its result, or a part and the log2 of its softmax denominator."""
    row, split = tl.program_id(1), tl.program_id(2)
    length = tl.load(positions + row) + 1
    begin = split * SPLIT
    if begin >= length:
        return
    head = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    c, r, s = tl.arange(0, C), tl.arange(0, R), tl.arange(0, PAGE)
    q_at = q + (row.to(tl.int64) * H + head)[:, None] * (C + R)
    q_latent = tl.load(q_at + c[None, :], head[:, None] < H, other=0.0)
    q_rope = tl.load(q_at + C + r[None, :], head[:, None] < H, other=0.0)
    table = page_table + tl.load(sequence + row) * table_row
    highest = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    result = tl.zeros((BLOCK_H, C), tl.float32)
    stop = min(begin + SPLIT, length)
    whole = stop // PAGE * PAGE
    for start in range(begin, whole, PAGE):
        first = tl.load(table + start // PAGE) * PAGE
        latent, key = latents.load([first, 0]), keys.load([first, C])
        score = tl.dot(q_rope, key.T, tl.dot(q_latent, latent.T)) * scale_log2
        highest, total, result = meet(score, latent, highest, total, result)
    if whole < stop:  # nobody knows what lies beyond the last token; NaN times 0 is NaN
        first = tl.load(table + whole // PAGE) * PAGE
        seen = whole + s < stop
        latent, key = latents.load([first, 0]), keys.load([first, C])
        latent = tl.where(seen[:, None], latent, 0.0)
        score = tl.dot(q_rope, key.T, tl.dot(q_latent, latent.T)) * scale_log2
        score = tl.where(seen[None, :], score, float("-inf"))
        highest, total, result = meet(score, latent, highest, total, result)
    at = row.to(tl.int64) * H
    target = out + at * C
    if length > SPLIT:
        at = (row.to(tl.int64) * splits + split) * H
        target = part + at * C
    result = (result / total[:, None]).to(out.dtype.element_ty)
    tl.store(target + head[:, None] * C + c[None, :], result, head[:, None] < H)
    tl.store(part_lse + at + head, highest + tl.log2(total), (head < H) & (length > SPLIT))


@triton.jit
def _piece(latents, scales, first, token, seen, FROM: tl.constexpr, GROUP: tl.constexpr):
    """The next values of a page's tokens, of one group, in bfloat16; zeros of those not seen."""
    data = latents.load([first, FROM]).to(tl.float32)
    data = data * tl.load(scales + token + FROM // GROUP)[:, None]
    return tl.where(seen[:, None], data, 0.0).to(tl.bfloat16)


@triton.jit
def decode_fp8_kernel(  # noqa: PLR0915  four pieces, each a variable of its own
    q, latents, scales, keys, page_table, sequence, positions, out, part, part_lse, H, scale_log2,
    table_row, splits, C: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr,
    BYTES: tl.constexpr, SCALES_AT: tl.constexpr, KEYS_AT: tl.constexpr, BLOCK_H: tl.constexpr,
    PAGE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """`decode_kernel` over FP8 pages, seen as e4m3, float32 and bfloat16. A latent is taken in four
    pieces, each within a scale's group, which are converted once for scores and values."""
    row, split = tl.program_id(1), tl.program_id(2)
    length = tl.load(positions + row) + 1
    begin = split * SPLIT
    if begin >= length:
        return
    W: tl.constexpr = C // 4
    head = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    c, r, s = tl.arange(0, W), tl.arange(0, R), tl.arange(0, PAGE)
    there = head[:, None] < H
    q_at = q + (row.to(tl.int64) * H + head)[:, None] * (C + R) + c[None, :]
    q0, q1 = tl.load(q_at, there, other=0.0), tl.load(q_at + W, there, other=0.0)
    q2, q3 = tl.load(q_at + 2 * W, there, other=0.0), tl.load(q_at + 3 * W, there, other=0.0)
    q_rope = q + (row.to(tl.int64) * H + head)[:, None] * (C + R) + C + r[None, :]
    q_rope = tl.load(q_rope, there, other=0.0)
    table = page_table + tl.load(sequence + row) * table_row
    highest = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    result0 = tl.zeros((BLOCK_H, W), tl.float32)
    result1 = tl.zeros((BLOCK_H, W), tl.float32)
    result2 = tl.zeros((BLOCK_H, W), tl.float32)
    result3 = tl.zeros((BLOCK_H, W), tl.float32)
    for start in range(begin, min(begin + SPLIT, length), PAGE):
        first = tl.load(table + start // PAGE) * PAGE
        token = ((first + s).to(tl.int64) * BYTES + SCALES_AT) // 4
        seen = start + s < length
        k0 = _piece(latents, scales, first, token, seen, 0 * W, GROUP)
        k1 = _piece(latents, scales, first, token, seen, 1 * W, GROUP)
        k2 = _piece(latents, scales, first, token, seen, 2 * W, GROUP)
        k3 = _piece(latents, scales, first, token, seen, 3 * W, GROUP)
        score = tl.dot(q_rope, keys.load([first, KEYS_AT // 2]).T)
        score = tl.dot(q1, k1.T, tl.dot(q0, k0.T, score))
        score = tl.dot(q3, k3.T, tl.dot(q2, k2.T, score)) * scale_log2
        score = tl.where(seen[None, :], score, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(score, axis=1))
        shrink = tl.exp2(highest - new_highest)
        weight = tl.exp2(score - new_highest[:, None])
        total = total * shrink + tl.sum(weight, axis=1)
        weight = weight.to(tl.bfloat16)
        result0 = tl.dot(weight, k0, result0 * shrink[:, None])
        result1 = tl.dot(weight, k1, result1 * shrink[:, None])
        result2 = tl.dot(weight, k2, result2 * shrink[:, None])
        result3 = tl.dot(weight, k3, result3 * shrink[:, None])
        highest = new_highest
    at = row.to(tl.int64) * H
    target = out + at * C
    if length > SPLIT:
        at = (row.to(tl.int64) * splits + split) * H
        target = part + at * C
    target = target + head[:, None] * C + c[None, :]
    tl.store(target, (result0 / total[:, None]).to(tl.bfloat16), there)
    tl.store(target + W, (result1 / total[:, None]).to(tl.bfloat16), there)
    tl.store(target + 2 * W, (result2 / total[:, None]).to(tl.bfloat16), there)
    tl.store(target + 3 * W, (result3 / total[:, None]).to(tl.bfloat16), there)
    tl.store(part_lse + at + head, highest + tl.log2(total), (head < H) & (length > SPLIT))


@triton.jit
def combine_kernel(
    part, part_lse, positions, out, H, splits, C: tl.constexpr, BLOCK_H: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """The parts of a row in ascending order, weighted by their share of the softmax."""
    row = tl.program_id(0)
    length = tl.load(positions + row) + 1
    if length <= SPLIT:
        return
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    c = tl.arange(0, C)
    used = tl.cdiv(length, SPLIT)
    at = row.to(tl.int64) * splits * H + head
    highest = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    result = tl.zeros((BLOCK_H, C), tl.float32)
    for split in range(0, used):
        lse = tl.load(part_lse + at + split * H, head < H, other=0.0)
        values = tl.load(part + (at + split * H)[:, None] * C + c[None, :], head[:, None] < H).to(
            tl.float32
        )
        new_highest = tl.maximum(highest, lse)
        shrink, weight = tl.exp2(highest - new_highest), tl.exp2(lse - new_highest)
        total = total * shrink + weight
        result = result * shrink[:, None] + values * weight[:, None]
        highest = new_highest
    target = out + (row.to(tl.int64) * H + head)[:, None] * C + c[None, :]
    tl.store(target, (result / total[:, None]).to(out.dtype.element_ty), head[:, None] < H)


def mla_attention(
    q: Tensor,
    pages: Tensor,
    page_table: Tensor,
    sequence: Tensor,
    positions: Tensor,
    scale: float,
    latent: int,
) -> Tensor:
    """As `mla_attention_ref`, in bfloat16: q [T, H, X], pages [P, 64, X] or FP8 -> [T, H, C].

    The page table's width bounds the splits of every row: a caller that knows the longest sequence
    of the batch should cut the table to it.
    """
    rows, heads, rope = q.shape[0], q.shape[1], q.shape[2] - latent
    out = torch.empty(rows, heads, latent, dtype=q.dtype, device=q.device)
    if not rows:
        return out
    splits = -(-page_table.shape[1] * PAGE_TOKENS // SPLIT_TOKENS)
    parts = splits if splits > 1 else 0
    each = min(rows, max(PARTS // splits // 4, 1) * 4)  # whole fours, so that slices are aligned
    part = torch.empty(each, parts, heads, latent, dtype=q.dtype, device=q.device)
    part_lse = torch.empty(each, parts, heads, device=q.device)
    tile = {"BLOCK_H": HEADS, "PAGE": PAGE_TOKENS, "SPLIT": SPLIT_TOKENS, "num_warps": WARPS,
            "num_stages": STAGES}  # fmt: skip
    flat = pages.view(-1, pages.shape[-1])
    kernel: Any = decode_kernel
    views: list[Any] = [_tiles(flat, latent), _tiles(flat, rope)]
    if pages.dtype is torch.uint8:
        token, (data, scales, keys) = Fp8Token(latent, rope), fp8_views(flat)
        kernel, views = decode_fp8_kernel, [_tiles(data, latent // 4), scales, _tiles(keys, rope)]
        tile |= {"GROUP": GROUP, "BYTES": token.size, "SCALES_AT": token.scales_at,
                 "KEYS_AT": token.keys_at}  # fmt: skip
    for first in range(0, rows, each):
        some = slice(first, first + each)
        kernel[triton.cdiv(heads, HEADS), len(q[some]), splits](
            q[some], *views, page_table, sequence[some], positions[some], out[some], part,
            part_lse, heads, scale * 1.4426950408889634, page_table.stride(0), splits, latent, rope,
            **tile,
        )  # fmt: skip
        if parts:
            combine_kernel[len(q[some]), triton.cdiv(heads, COMBINE_HEADS)](
                part, part_lse, positions[some], out[some], heads, splits, latent, COMBINE_HEADS,
                SPLIT_TOKENS, num_warps=4,
            )  # fmt: skip
    return out


def _tiles(flat: Tensor, width: int) -> TensorDescriptor:
    """What TMA loads a page's tokens by, so many values of each."""
    return TensorDescriptor.from_tensor(flat, [PAGE_TOKENS, width])


def variants() -> Iterator[Variant]:
    """For the gate; see `offline.py`."""
    types = {
        "q": "*bf16", "latents": f"tensordesc<bf16[{PAGE_TOKENS}, 512]>",
        "keys": f"tensordesc<bf16[{PAGE_TOKENS}, 64]>", "page_table": "*i32", "sequence": "*i32",
        "positions": "*i32", "out": "*bf16", "part": "*bf16", "part_lse": "*fp32",
        "scale_log2": "fp32",
    }  # fmt: skip
    decode = {"C": 512, "R": 64, "BLOCK_H": HEADS, "PAGE": PAGE_TOKENS, "SPLIT": SPLIT_TOKENS}
    combine = {"C": 512, "BLOCK_H": COMBINE_HEADS, "SPLIT": SPLIT_TOKENS}
    token = Fp8Token(512, 64)
    of_fp8 = {"latents": f"tensordesc<fp8e4nv[{PAGE_TOKENS}, 128]>", "scales": "*fp32"}
    fp8 = {"GROUP": GROUP, "BYTES": token.size, "SCALES_AT": token.scales_at,
           "KEYS_AT": token.keys_at}  # fmt: skip
    loose = ("table_row", "splits")
    yield Variant("mla_decode", decode_kernel, types, decode, WARPS, STAGES, wgmma=True, tma=True,
                  unaligned=loose)  # fmt: skip
    yield Variant("mla_decode fp8", decode_fp8_kernel, types | of_fp8, decode | fp8, WARPS, STAGES,
                  wgmma=True, tma=True, unaligned=loose)  # fmt: skip
    yield Variant("mla_combine", combine_kernel, types, combine, 4, unaligned=loose)
