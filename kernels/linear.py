"""Matrix product with a checkpoint weight, with the norm before and the residual after it."""

from __future__ import annotations

from torch import Tensor

from rayseek.kernels.ops import Norm
from rayseek.kernels.rms_norm import rms_norm_ref


def linear_ref(
    x_TK: Tensor, w_NK: Tensor, norm: Norm | None = None, residual_TN: Tensor | None = None
) -> Tensor:
    """norm(x) @ w.T (+ residual): float32 [T, K] and [N, K] -> [T, N]."""
    x = x_TK.float() if norm is None else rms_norm_ref(x_TK, norm)
    y = x @ w_NK.T
    return y if residual_TN is None else y + residual_TN
