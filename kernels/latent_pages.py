"""Writing new latents into the paged cache: 64 tokens a page, C + R values a token."""

from __future__ import annotations

import torch
from torch import Tensor

from rayseek.kernels.ops import Norm
from rayseek.kernels.rms_norm import rms_norm_ref
from rayseek.kernels.rope import rotate_ref


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
    positions_T: int32. slots_T: int64, page * 64 + offset. pages: float32 [P, 64, C + R].
    Spec section 1.3; the key stays interleaved.
    """
    latent, key = ckr_TX.float().split([norm.weight_K.numel(), cos_sin_PR.shape[1]], dim=-1)
    rows = torch.cat(
        [rms_norm_ref(latent, norm), rotate_ref(key, cos_sin_PR[positions_T.long()])], dim=-1
    )
    pages.view(-1, pages.shape[-1])[slots_T] = rows
