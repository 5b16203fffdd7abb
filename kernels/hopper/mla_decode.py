"""Absorbed MLA over paged latents: one 576-wide key per token for all heads, 512 of it the value.

A program takes 64 heads of one row (the smallest tile that wgmma has) and one split of its
sequence. Splits have a fixed length and are combined in order, so a row's result depends on its own
position alone: not on the batch, nor on whether it came in a decode step, as one of several
speculated tokens, or in a prompt. Reference: `mla_attention_ref`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rayseek.kernels.hopper.offline import Variant
from rayseek.kernels.ops import PAGE_TOKENS

SPLIT_TOKENS = 1024  # a row whose sequence fits is done in one piece
HEADS, WARPS, STAGES = 64, 8, 2
COMBINE_HEADS = 4


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
    for start in range(begin, min(begin + SPLIT, length), PAGE):
        first = tl.load(table + start // PAGE) * PAGE
        latent = latents.load([first, 0])
        key = keys.load([first, C])
        score = tl.dot(q_latent, latent.T)
        score = tl.dot(q_rope, key.T, score) * scale_log2
        score = tl.where((start + s)[None, :] < length, score, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(score, axis=1))
        shrink = tl.exp2(highest - new_highest)
        weight = tl.exp2(score - new_highest[:, None])
        total = total * shrink + tl.sum(weight, axis=1)
        # What unused slots hold is never seen: their weight is 0, and pages start as zeros.
        result = tl.dot(weight.to(latent.dtype), latent, result * shrink[:, None])
        highest = new_highest
    at = row.to(tl.int64) * H
    target = out + at * C
    if length > SPLIT:
        at = (row.to(tl.int64) * splits + split) * H
        target = part + at * C
    result = (result / total[:, None]).to(out.dtype.element_ty)
    tl.store(target + head[:, None] * C + c[None, :], result, head[:, None] < H)
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


def splits_for(tokens: int) -> int:
    """Splits of a sequence of so many tokens."""
    return -(-tokens // SPLIT_TOKENS)


def mla_attention(
    q: Tensor,
    pages: Tensor,
    page_table: Tensor,
    sequence: Tensor,
    positions: Tensor,
    scale: float,
    latent: int,
) -> Tensor:
    """As `mla_attention_ref`, in bfloat16: q [T, H, X], pages [P, 64, X] -> [T, H, C].

    The page table's width bounds the splits of every row: a caller that knows the longest sequence
    of the batch should cut the table to it.
    """
    rows, heads, width = q.shape
    out = torch.empty(rows, heads, latent, dtype=q.dtype, device=q.device)
    if not rows:
        return out
    splits = splits_for(page_table.shape[1] * PAGE_TOKENS)
    parts = splits if splits > 1 else 0
    flat = pages.view(-1, width)
    part = torch.empty(rows, parts, heads, latent, dtype=q.dtype, device=q.device)
    part_lse = torch.empty(rows, parts, heads, device=q.device)
    decode_kernel[(triton.cdiv(heads, HEADS), rows, splits)](
        q, TensorDescriptor.from_tensor(flat, [PAGE_TOKENS, latent]),
        TensorDescriptor.from_tensor(flat, [PAGE_TOKENS, width - latent]),
        page_table, sequence, positions, out, part, part_lse, heads,
        scale * 1.4426950408889634, page_table.stride(0), splits, latent, width - latent, HEADS,
        PAGE_TOKENS, SPLIT_TOKENS, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    if parts:
        combine_kernel[(rows, triton.cdiv(heads, COMBINE_HEADS))](
            part, part_lse, positions, out, heads, splits, latent, COMBINE_HEADS, SPLIT_TOKENS,
            num_warps=4,
        )  # fmt: skip
    return out


def _variants() -> list[Variant]:
    types = {
        "q": "*bf16", "latents": f"tensordesc<bf16[{PAGE_TOKENS}, 512]>",
        "keys": f"tensordesc<bf16[{PAGE_TOKENS}, 64]>", "page_table": "*i32", "sequence": "*i32",
        "positions": "*i32", "out": "*bf16", "part": "*bf16", "part_lse": "*fp32",
        "scale_log2": "fp32",
    }  # fmt: skip
    decode = {"C": 512, "R": 64, "BLOCK_H": HEADS, "PAGE": PAGE_TOKENS, "SPLIT": SPLIT_TOKENS}
    combine = {"C": 512, "BLOCK_H": COMBINE_HEADS, "SPLIT": SPLIT_TOKENS}
    loose = ("table_row", "splits")
    return [
        Variant("mla_decode", decode_kernel, types, decode, WARPS, STAGES, wgmma=True, tma=True,
                unaligned=loose),
        Variant("mla_combine", combine_kernel, types, combine, 4, unaligned=loose),
    ]  # fmt: skip


VARIANTS = _variants()
