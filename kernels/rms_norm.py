"""RMSNorm: the only normalisation of the model (spec section 1.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from rayseek.kernels.ops import Norm


def rms_norm_ref(x_TD: Tensor, norm: Norm) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight over the last dimension, float32 [..., D]."""
    x = x_TD.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight_K
