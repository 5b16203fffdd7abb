"""Writing new latents into the paged cache, and reading them: 64 tokens a page, C + R values each.

A plain page holds the values; an FP8 page is bytes, laid out by `kv_format.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayseek.kernels.fp8 import E4M3_MAX
from rayseek.kernels.kv_format import GROUP, Fp8Token
from rayseek.kernels.ops import Norm
from rayseek.kernels.rms_norm import rms_norm_ref
from rayseek.kernels.rope import rotate_ref

SMALLEST = 63  # exponent bits of the least scale, 2^-64: for groups of zeros


def store_latents_ref(
    ckr_TX: Tensor,
    norm: Norm,
    cos_sin_PR: Tensor,
    positions_T: Tensor,
    slots_T: Tensor,
    pages: Tensor,
) -> None:
    """Write (RMSNorm of the latent, rotated key) of T tokens into pages at slots, in place.

    ckr_TX: float32 [T, C + R], the output of kv_a_proj_with_mqa; the norm covers its first C.
    positions_T: int32. slots_T: int64, page * 64 + offset. pages: float32 [P, 64, C + R], or FP8:
    uint8 [P, 64, bytes of a token]. Spec section 1.3; the key stays interleaved.
    """
    latent, key = ckr_TX.float().split([norm.weight_K.numel(), cos_sin_PR.shape[1]], dim=-1)
    latent, key = rms_norm_ref(latent, norm), rotate_ref(key, cos_sin_PR[positions_T.long()])
    if pages.dtype is torch.uint8:
        rows = fp8_tokens_ref(latent, key)
    else:
        rows = torch.cat([latent, key], dim=-1)
    pages.view(-1, pages.shape[-1])[slots_T] = rows


def fp8_tokens_ref(latent_TC: Tensor, key_TR: Tensor) -> Tensor:
    """Tokens as they lie in an FP8 page: uint8 [T, bytes].

    A group's scale is the least power of two that brings its values within e4m3's 448.
    """
    (rows, latent), rope = latent_TC.shape, key_TR.shape[1]
    token = Fp8Token(latent, rope)
    groups = torch.nn.functional.pad(latent_TC, (0, -latent % GROUP)).unflatten(1, (-1, GROUP))
    scale = _power_of_two(groups.abs().amax(dim=-1))
    data = (groups / scale[..., None]).clamp(-E4M3_MAX, E4M3_MAX).flatten(1)[:, :latent]
    out = torch.zeros(rows, token.size, dtype=torch.uint8, device=latent_TC.device)
    out[:, :latent] = data.to(torch.float8_e4m3fn).view(torch.uint8)
    out[:, token.scales_at : token.scales_at + 4 * token.groups] = scale.view(torch.uint8)
    keys = key_TR.bfloat16().contiguous().view(torch.uint8)
    out[:, token.keys_at : token.keys_at + 2 * rope] = keys
    return out


def read_pages_ref(pages: Tensor, latent: int, rope: int) -> Tensor:
    """The values [P, 64, C + R] of plain pages, or of FP8 pages in float32."""
    if pages.dtype is not torch.uint8:
        return pages
    token = Fp8Token(latent, rope)
    data = pages[..., :latent].view(torch.float8_e4m3fn).float()
    scales_end, keys_end = token.scales_at + 4 * token.groups, token.keys_at + 2 * rope
    scale = pages[..., token.scales_at : scales_end].contiguous().view(torch.float32)
    keys = pages[..., token.keys_at : keys_end].contiguous().view(torch.bfloat16)
    values = data * scale.repeat_interleave(GROUP, dim=-1)[..., :latent]
    return torch.cat([values, keys.float()], dim=-1)


def _power_of_two(amax: Tensor) -> Tensor:
    """The least power of two p, from 2^-64 up, with amax / p <= 448 = 1.75 * 2^8; by its bits."""
    exponent = ((amax.view(torch.int32) + 0x1FFFFF) >> 23) - 8  # one more above 1.75
    return (exponent.clamp(min=SMALLEST) << 23).view(torch.float32)
