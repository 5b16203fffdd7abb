"""The gated MLP, alone and as the routed experts of a layer (spec section 1.5)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def mlp_ref(x_TD: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate x) * up x): x [T, D], gate_up [2F, D] (gate above up), down [D, F]."""
    gate, up = (x_TD.float() @ gate_up.T).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ down.T


def experts_ref(
    x_TD: Tensor,
    expert_TK: Tensor,
    weight_TK: Tensor,
    gate_up: list[Tensor],
    down: list[Tensor],
    into_TD: Tensor,
) -> None:
    """into[t] += weight[t, k] * mlp of expert[t, k] (x[t]), in place, ascending by expert.

    The order makes the sum independent of where an expert runs; product and sum are rounded
    separately so that it is the same when the product arrives from another rank.
    """
    for expert in expert_TK.unique().tolist():
        row, k = (expert_TK == expert).nonzero(as_tuple=True)
        y = mlp_ref(x_TD[row], gate_up[expert], down[expert])
        into_TD[row] += weight_TK[row, k, None] * y
