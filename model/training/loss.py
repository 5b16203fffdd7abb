"""Cross-entropy through the head: only on weighted rows, a chunk of them at a time.

The gradient is made together with the loss, so that logits are never kept; statistics in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 512  # rows whose logits exist at once; the last chunk is filled up with weightless rows


@torch.compile(dynamic=False)
def _loss_and_gradient(
    logits_RV: Tensor, target_R: Tensor, weight_R: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted loss of the rows, gradient of their logits, and whether the best one is right."""
    logits = logits_RV.float()
    top = logits.amax(-1, keepdim=True)
    exp = (logits - top).exp()
    total = exp.sum(-1, keepdim=True)
    here = torch.arange(logits.shape[-1], device=logits.device) == target_R[:, None]
    at_target = torch.where(here, logits, 0.0).sum(-1)
    loss = ((top + total.log())[:, 0] - at_target) * weight_R
    gradient = (exp / total - here.float()) * weight_R[:, None]
    return loss, gradient.to(logits_RV.dtype), at_target == top[:, 0]


class HeadLoss(torch.autograd.Function):
    """(states, head, target, weight) -> (sum of weight * cross-entropy, whether right [T]).

    states [T, D] already normed; rows of weight 0 cost nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, state_TD: Tensor, head_VD: Tensor, target_T: Tensor, weight_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        row_R = weight_T.nonzero().flatten()
        count = len(row_R)
        row_R = torch.cat([row_R, row_R.new_zeros(-count % CHUNK)])
        weight_R = weight_T[row_R]
        weight_R[count:] = 0
        state_RD, target_R = state_TD[row_R], target_T[row_R]
        dstate_RD = torch.empty_like(state_RD)
        dhead = torch.zeros(head_VD.shape, device=head_VD.device)
        loss = torch.zeros((), device=head_VD.device)
        right_T = torch.zeros(len(weight_T), dtype=torch.bool, device=head_VD.device)
        for begin in range(0, len(row_R), CHUNK):
            part = slice(begin, begin + CHUNK)
            losses, dlogits, right = _loss_and_gradient(
                state_RD[part] @ head_VD.T, target_R[part], weight_R[part]
            )
            loss += losses.sum()
            right_T[row_R[part]] |= right & (weight_R[part] > 0)
            torch.mm(dlogits, head_VD, out=dstate_RD[part])
            dhead += dlogits.T @ state_RD[part]
        dstate_TD = torch.zeros_like(state_TD)
        dstate_TD[row_R[:count]] = dstate_RD[:count]
        ctx.save_for_backward(dstate_TD, dhead.to(head_VD.dtype))
        ctx.mark_non_differentiable(right_T)
        return loss, right_T

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        dstate_TD, dhead = ctx.saved_tensors
        return dstate_TD * dloss.to(dstate_TD.dtype), dhead * dloss.to(dhead.dtype), None, None
