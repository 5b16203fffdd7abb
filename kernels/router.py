"""The router: which experts a token goes to, and how much each counts (spec section 1.6)."""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-20  # keeps 0/0 from a row whose sigmoids all underflow; vanishes in any other sum


def route_ref(
    logits_TE: Tensor,
    bias_E: Tensor,
    groups: int,
    keep_groups: int,
    top_k: int,
    normalise: bool,
    factor: float,
) -> tuple[Tensor, Tensor]:
    """Experts of each row, int32 [T, K] ascending, and their float32 weights [T, K].

    Chosen by sigmoid + bias among the keep_groups groups whose two best sum highest; weighted by
    the sigmoid alone. Other groups are masked with -inf, since a biased score may be negative.
    Equal scores go to the lower id.
    """
    rows, experts = logits_TE.shape
    score = logits_TE.float().sigmoid()
    biased = (score + bias_E).view(rows, groups, experts // groups)
    best_two = biased.sort(-1, descending=True).values[..., :2].sum(-1)
    kept = _first_k(best_two, keep_groups)
    masked = torch.full_like(biased, float("-inf"))
    index = kept[..., None].expand(-1, -1, biased.shape[-1])
    masked.scatter_(1, index, biased.gather(1, index))
    chosen = _first_k(masked.flatten(1), top_k).sort(-1).values
    weight = score.gather(1, chosen)
    if normalise:
        weight = weight / (weight.sum(-1, keepdim=True) + TINY)
    return chosen.int(), weight * factor


def _first_k(score: Tensor, k: int) -> Tensor:
    """Indices of the k largest of each row; of equals the first ones."""
    return score.sort(dim=-1, descending=True, stable=True).indices[:, :k]
