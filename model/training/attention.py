"""Attention of training: rows of fixed length, each holding several documents.

The naive form of MLA (spec section 1.3): keys and values are expanded for every head. A token sees
the tokens of its own document up to itself, which is a range of its row. Products run in the
compute dtype, softmax statistics in float32; the gradient is written out, since the two large
elementwise parts are then one compiled pass each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.compile(dynamic=False)
def row_mask(position_BL: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, L, L]: 0 where a token sees another, -inf elsewhere. position: in its document."""
    index = torch.arange(position_BL.shape[1], dtype=torch.int32, device=position_BL.device)
    start = (index - position_BL)[:, :, None]
    seen = (index >= start) & (index <= index[:, None])
    return torch.where(seen, 0.0, -torch.inf).to(dtype)[:, None]


@torch.compile(dynamic=False)
def _probabilities(scores_BHLL: Tensor, mask_B1LL: Tensor, scale: float) -> Tensor:
    scores = scores_BHLL.float() * scale + mask_B1LL.float()
    return torch.softmax(scores, dim=-1).to(scores_BHLL.dtype)


@torch.compile(dynamic=False)
def _score_gradient(probs_BHLL: Tensor, dprobs_BHLL: Tensor, scale: float) -> Tensor:
    probs, dprobs = probs_BHLL.float(), dprobs_BHLL.float()
    mean = (probs * dprobs).sum(-1, keepdim=True)
    return (probs * (dprobs - mean) * scale).to(probs_BHLL.dtype)


class RowAttention(torch.autograd.Function):
    """(q, k, v, mask, scale) -> [B, H, L, V]; q, k [B, H, L, W], v [B, H, L, V].

    The mask of a batch serves all its layers; see `row_mask`.
    """

    @staticmethod
    def forward(
        ctx: Any, q_BHLW: Tensor, k_BHLW: Tensor, v_BHLV: Tensor, mask_B1LL: Tensor, scale: float
    ) -> Tensor:
        probs = _probabilities(q_BHLW @ k_BHLW.mT, mask_B1LL, scale)
        ctx.save_for_backward(q_BHLW, k_BHLW, v_BHLV, probs)
        ctx.scale = scale
        return probs @ v_BHLV

    @staticmethod
    def backward(ctx: Any, out_BHLV: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, probs = ctx.saved_tensors
        dscores = _score_gradient(probs, out_BHLV @ v.mT, ctx.scale)
        return dscores @ k, dscores.mT @ q, probs.mT @ out_BHLV, None, None
