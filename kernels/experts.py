"""The gated MLP, alone and as the routed experts of a layer (spec section 1.5).

`experts_ref` is `expert_rows_ref` and `combine_ref` in one: first every product of an expert and a
row, then the sums. An expert that runs on another rank splits the two.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mlp_ref(x_TD: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate x) * up x): x [T, D], gate_up [2F, D] (gate above up), down [D, F]."""
    gate, up = (x_TD.float() @ gate_up.T).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ down.T


def expert_rows_ref(
    x_TD: Tensor, row_N: Tensor, expert_N: Tensor, gate_up: list[Tensor], down: list[Tensor]
) -> Tensor:
    """y[i] = mlp of expert_N[i] (x[row_N[i]]), float32 [N, D]; zeros where the expert is -1.

    The rows of one expert are multiplied together.
    """
    y_ND = x_TD.new_zeros(len(row_N), x_TD.shape[1], dtype=torch.float32)
    for expert in expert_N[expert_N >= 0].unique().tolist():
        at = (expert_N == expert).nonzero()[:, 0]
        y_ND[at] = mlp_ref(x_TD[row_N[at]], gate_up[expert], down[expert])
    return y_ND


def combine_ref(y_MD: Tensor, index_TK: Tensor, weight_TK: Tensor, into_TD: Tensor) -> None:
    """into[t] += weight[t, k] * y[index[t, k]], in place, k ascending.

    Experts ascend with k, so the sum does not depend on where an expert runs; product and sum are
    rounded separately so that it is the same when the product arrives from another rank.
    """
    for k in range(index_TK.shape[1]):
        into_TD += weight_TK[:, k, None] * y_MD[index_TK[:, k]]


def experts_ref(
    x_TD: Tensor,
    expert_TK: Tensor,
    weight_TK: Tensor,
    gate_up: list[Tensor],
    down: list[Tensor],
    into_TD: Tensor,
) -> None:
    """into[t] += weight[t, k] * mlp of expert[t, k] (x[t]), in place, ascending by expert."""
    pairs = torch.arange(expert_TK.numel(), device=expert_TK.device)
    row_N = pairs // expert_TK.shape[1]
    y_ND = expert_rows_ref(x_TD, row_N, expert_TK.reshape(-1), gate_up, down)
    combine_ref(y_ND, pairs.view(expert_TK.shape), weight_TK, into_TD)
