"""Rotary positions, and writing the latent cache.

A token's row is its normalised latent, then its rotated key: side by side in bfloat16 pages
[P, 64, C + R], 1152 bytes for V3, or as `kv_format.py` lays out FP8 pages, 656 bytes.
References: `store_latents_ref`, `rotate_ref`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from rayseek.kernels.hopper.offline import Variant
from rayseek.kernels.kv_format import GROUP, Fp8Token
from rayseek.kernels.ops import Norm


@triton.jit
def store_kernel(
    ckr, weight, cos_sin, positions, slots, pages, eps, stride, C: tl.constexpr, R: tl.constexpr
):
    """One row: RMSNorm of its latent and rotation of its key, rounded once, into its slot."""
    row = tl.program_id(0)
    target = pages + tl.load(slots + row).to(tl.int64) * (C + R)
    source = ckr + row.to(tl.int64) * stride
    c = tl.arange(0, C)
    latent = tl.load(source + c).to(tl.float32)
    latent = latent * tl.rsqrt(tl.sum(latent * latent, axis=0) / C + eps) * tl.load(weight + c)
    tl.store(target + c, latent.to(pages.dtype.element_ty))
    pair = tl.arange(0, R // 2)
    angle = cos_sin + tl.load(positions + row).to(tl.int64) * R + pair
    cos, sin = tl.load(angle), tl.load(angle + R // 2)
    even = tl.load(source + C + 2 * pair).to(tl.float32)
    odd = tl.load(source + C + 2 * pair + 1).to(tl.float32)
    tl.store(target + C + 2 * pair, (even * cos - odd * sin).to(pages.dtype.element_ty))
    tl.store(target + C + 2 * pair + 1, (even * sin + odd * cos).to(pages.dtype.element_ty))


@triton.jit
def store_fp8_kernel(
    ckr, weight, cos_sin, positions, slots, latents, scales, keys, eps, stride, C: tl.constexpr,
    R: tl.constexpr, GROUP: tl.constexpr, BYTES: tl.constexpr, SCALES_AT: tl.constexpr,
    KEYS_AT: tl.constexpr,
):  # fmt: skip
    """The same into an FP8 page, seen as e4m3, float32 and bfloat16. A group's scale is the least
    power of two that brings it within 448 = 1.75 * 2^8, so the exponent is one more above 1.75."""
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    source = ckr + row.to(tl.int64) * stride
    group = tl.arange(0, C // GROUP)
    c = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    latent = tl.load(source + c).to(tl.float32)
    mean = tl.sum(tl.sum(latent * latent, axis=1), axis=0) / C
    latent = latent * tl.rsqrt(mean + eps) * tl.load(weight + c)
    amax = tl.max(tl.abs(latent), axis=1)
    exponent = tl.maximum(((amax.to(tl.int32, bitcast=True) + 0x1FFFFF) >> 23) - 8, 63)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    tl.store(latents + slot * BYTES + c, (latent * inverse[:, None]).to(tl.float8e4nv))
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    tl.store(scales + (slot * BYTES + SCALES_AT) // 4 + group, scale)
    pair = tl.arange(0, R // 2)
    angle = cos_sin + tl.load(positions + row).to(tl.int64) * R + pair
    cos, sin = tl.load(angle), tl.load(angle + R // 2)
    even = tl.load(source + C + 2 * pair).to(tl.float32)
    odd = tl.load(source + C + 2 * pair + 1).to(tl.float32)
    target = keys + (slot * BYTES + KEYS_AT) // 2 + 2 * pair
    tl.store(target, (even * cos - odd * sin).to(tl.bfloat16))
    tl.store(target + 1, (even * sin + odd * cos).to(tl.bfloat16))


@triton.jit
def rotate_kernel(
    q, cos_sin, positions, out, H, q_row, q_head, out_row, out_head, R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The rotary parts of a row's queries, all heads by the row's one angle per pair."""
    row = tl.program_id(0)
    pair = tl.arange(0, R // 2)
    angle = cos_sin + tl.load(positions + row).to(tl.int64) * R + pair
    cos, sin = tl.load(angle)[None, :], tl.load(angle + R // 2)[None, :]
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    source = q + row.to(tl.int64) * q_row + head * q_head + 2 * pair[None, :]
    even = tl.load(source, head < H, other=0.0).to(tl.float32)
    odd = tl.load(source + 1, head < H, other=0.0).to(tl.float32)
    target = out + row.to(tl.int64) * out_row + head * out_head + 2 * pair[None, :]
    kind = out.dtype.element_ty
    tl.store(target, (even * cos - odd * sin).to(kind), head < H)
    tl.store(target + 1, (even * sin + odd * cos).to(kind), head < H)


ROTATE_HEADS = 32


def store_latents(
    ckr: Tensor, norm: Norm, cos_sin: Tensor, positions: Tensor, slots: Tensor, pages: Tensor
) -> None:
    """As `store_latents_ref`, into bfloat16 or FP8 pages; ckr may be a slice of wider rows."""
    if not len(ckr):
        return
    latent, rope = norm.weight_K.shape[0], cos_sin.shape[1]
    if pages.dtype is torch.uint8:
        token = Fp8Token(latent, rope)
        store_fp8_kernel[(len(ckr),)](
            ckr, norm.weight_K, cos_sin, positions, slots, *fp8_views(pages), norm.eps,
            ckr.stride(0), latent, rope, min(GROUP, latent), token.size, token.scales_at,
            token.keys_at, num_warps=4,
        )  # fmt: skip
    else:
        store_kernel[(len(ckr),)](
            ckr, norm.weight_K, cos_sin, positions, slots, pages, norm.eps, ckr.stride(0),
            latent, rope, num_warps=4,
        )  # fmt: skip


def fp8_views(pages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """FP8 pages as e4m3, float32 and bfloat16."""
    return pages.view(torch.float8_e4m3fn), pages.view(torch.float32), pages.view(torch.bfloat16)


def rotate_queries(q: Tensor, cos_sin: Tensor, positions: Tensor, out: Tensor) -> None:
    """out[t, h] = q[t, h] [T, H, R] rotated to position t; both may be slices of wider rows."""
    rows, heads, rope = q.shape
    if rows:
        rotate_kernel[(rows, triton.cdiv(heads, ROTATE_HEADS))](
            q, cos_sin, positions, out, heads, q.stride(0), q.stride(1), out.stride(0),
            out.stride(1), rope, ROTATE_HEADS, num_warps=4,
        )  # fmt: skip


def variants() -> Iterator[Variant]:
    """For the gate; see `offline.py`."""
    types = {
        "ckr": "*bf16", "weight": "*fp32", "cos_sin": "*fp32", "positions": "*i32",
        "slots": "*i64", "pages": "*bf16", "eps": "fp32", "q": "*bf16", "out": "*bf16",
        "latents": "*fp8e4nv", "scales": "*fp32", "keys": "*bf16",
    }  # fmt: skip
    token, sizes = Fp8Token(512, 64), {"C": 512, "R": 64}
    fp8 = sizes | {"GROUP": GROUP, "BYTES": token.size, "SCALES_AT": token.scales_at,
                   "KEYS_AT": token.keys_at}  # fmt: skip
    yield Variant("store_latents", store_kernel, types, sizes, 4)
    yield Variant("store_latents fp8", store_fp8_kernel, types, fp8, 4)
    rotate = {"R": 64, "BLOCK_H": ROTATE_HEADS}
    yield Variant("rotate_queries", rotate_kernel, types, rotate, 4)
