"""Rotary positions on interleaved pairs, with YaRN frequencies (spec section 1.4).

Pair i is dimensions (2i, 2i + 1), the layout of the checkpoint's rows; nothing is permuted.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def yarn_frequencies(
    dim: int,
    theta: float,
    factor: float,
    original_positions: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> Tensor:
    """Radians per position of each of the dim/2 pairs, float64.

    Pairs that turn more than beta_fast times in the original context keep their frequency, those
    that turn less than beta_slow times are slowed by factor, with a linear ramp between.
    """
    pair = torch.arange(dim // 2, dtype=torch.float64)
    plain = theta ** (-2.0 * pair / dim)

    def pair_with_turns(turns: float) -> float:
        return dim * math.log(original_positions / (2 * math.pi * turns)) / (2 * math.log(theta))

    low = max(math.floor(pair_with_turns(beta_fast)), 0)
    high = min(math.ceil(pair_with_turns(beta_slow)), dim - 1)
    ramp = ((pair - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain * (1 - ramp) + plain / factor * ramp


def yarn_cos_sin(
    positions: int,
    dim: int,
    theta: float,
    factor: float,
    original_positions: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> Tensor:
    """cos_sin_PR, float32 [positions, dim]: cos of the dim/2 pairs, then their sin.

    Computed in float64, so that an angle of thousands of turns keeps its digits. No attention
    factor is applied: it is 1 for V3 (spec section 1.4).
    """
    frequency = yarn_frequencies(dim, theta, factor, original_positions, beta_fast, beta_slow)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1).float()


def rotate_ref(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate pairs of the last dimension: x [..., R] by cos_sin [..., R] (broadcast)."""
    even, odd = x.float()[..., 0::2], x.float()[..., 1::2]
    cos, sin = cos_sin.chunk(2, dim=-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
