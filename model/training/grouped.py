"""The routed experts of training: rows sorted by expert, one matmul for each expert.

Every expert's share is padded to a multiple of `ROUND` rows, so that the matmul library meets few
different shapes and keeps its kernels. Dispatch and combination are gathers in both directions,
so results do not depend on any order of execution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROUND = 64


@dataclass(frozen=True, slots=True)
class Plan:
    """Where the rows of a batch go.

    slot_TK: place of (token, choice) among the sorted rows. token_R: token of each place (0 where
    there is none). bounds: of each expert's places, padding included. count_E: tokens an expert
    got. R is the same for every batch of T tokens.
    """

    slot_TK: Tensor
    token_R: Tensor
    bounds: list[tuple[int, int]]
    count_E: Tensor


def plan_dispatch(expert_TK: Tensor, experts: int) -> Plan:
    """Sort the choices [T, K] of a batch by expert, then by token."""
    tokens, k = expert_TK.shape
    device = expert_TK.device
    chosen_ET = torch.zeros(experts, tokens, dtype=torch.int32, device=device)
    chosen_ET.scatter_(0, expert_TK.T.long(), 1)
    rank_ET = chosen_ET.cumsum(1, dtype=torch.int32)
    count_E = rank_ET[:, -1].long()
    ends = ((count_E + ROUND - 1) // ROUND * ROUND).cumsum(0).tolist()
    bounds = list(zip([0, *ends[:-1]], ends, strict=True))
    first_E = torch.tensor([begin for begin, _ in bounds], dtype=torch.int32, device=device)
    rank_ET += first_E[:, None] - 1
    slot_TK = rank_ET.T.gather(1, expert_TK.long()).long()
    token_R = torch.zeros(tokens * k + experts * ROUND, dtype=torch.int64, device=device)
    token_R[slot_TK.flatten()] = torch.arange(tokens, device=device).repeat_interleave(k)
    return Plan(slot_TK, token_R, bounds, count_E)


@torch.compile(dynamic=False)
def _activate(hidden_RF2: Tensor, weight_R: Tensor) -> Tensor:
    gate, up = hidden_RF2.float().chunk(2, dim=-1)
    return (F.silu(gate) * up * weight_R[:, None]).to(hidden_RF2.dtype)


@torch.compile(dynamic=False)
def _activate_gradient(
    hidden_RF2: Tensor, weight_R: Tensor, dact_RF: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the hidden values and the weights, and the activation once more."""
    gate, up = hidden_RF2.float().chunk(2, dim=-1)
    dact, weight = dact_RF.float(), weight_R[:, None]
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    dweight = (dact * silu * up).sum(-1)
    dact = dact * weight
    dgate = dact * up * (sigmoid + silu * (1 - sigmoid))
    dhidden = torch.cat([dgate, dact * silu], dim=-1).to(hidden_RF2.dtype)
    return dhidden, dweight, (silu * up * weight).to(hidden_RF2.dtype)


@torch.compile(dynamic=False)
def _combine(rows_RD: Tensor, slot_TK: Tensor) -> Tensor:
    parts = rows_RD[slot_TK[:, 0]].float()
    for k in range(1, slot_TK.shape[1]):
        parts = parts + rows_RD[slot_TK[:, k]].float()
    return parts.to(rows_RD.dtype)


class GroupedExperts(torch.autograd.Function):
    """(x, weights, gate_up, down, plan) -> sum over k of weight[t, k] * expert[t, k](x[t]).

    x_TD in the compute dtype; weight_TK float32; gate_up [E, 2F, D]; down [E, D, F].
    """

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_TK: Tensor, gate_up: Tensor, down: Tensor, plan: Plan
    ) -> Tensor:
        rows = len(plan.token_R)
        weight_R = weight_TK.new_zeros(rows)
        weight_R[plan.slot_TK.flatten()] = weight_TK.flatten()
        x_RD = x_TD.index_select(0, plan.token_R)
        hidden = _grouped(x_RD, gate_up.mT, plan)
        y_RD = _grouped(_activate(hidden, weight_R), down.mT, plan)
        ctx.save_for_backward(x_TD, weight_R, gate_up, down, hidden)
        ctx.plan = plan
        return _combine(y_RD, plan.slot_TK)

    @staticmethod
    def backward(ctx: Any, out_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_R, gate_up, down, hidden = ctx.saved_tensors
        plan = ctx.plan
        dy_RD = out_TD.index_select(0, plan.token_R)
        dhidden, dweight_R, act_RF = _activate_gradient(
            hidden, weight_R, _grouped(dy_RD, down, plan)
        )
        ddown = _grouped_gradient(dy_RD, act_RF, plan)
        dgate_up = _grouped_gradient(dhidden, x_TD.index_select(0, plan.token_R), plan)
        dx_TD = _combine(_grouped(dhidden, gate_up, plan), plan.slot_TK)
        return dx_TD, dweight_R[plan.slot_TK], dgate_up, ddown, None


def _grouped(x_RK: Tensor, w_EKN: Tensor, plan: Plan) -> Tensor:
    """x @ w of each row's expert -> [R, N]; rows beyond the last share are not written."""
    out = x_RK.new_empty(len(x_RK), w_EKN.shape[2])
    for (begin, end), w in zip(plan.bounds, w_EKN, strict=True):
        torch.mm(x_RK[begin:end], w, out=out[begin:end])
    return out


def _grouped_gradient(dy_RN: Tensor, x_RK: Tensor, plan: Plan) -> Tensor:
    """dy.T @ x over each expert's rows -> [E, N, K]. Padding rows must be zero in one of them."""
    out = dy_RN.new_empty(len(plan.bounds), dy_RN.shape[1], x_RK.shape[1])
    for (begin, end), dw in zip(plan.bounds, out, strict=True):
        torch.mm(dy_RN[begin:end].T, x_RK[begin:end], out=dw)
    return out
