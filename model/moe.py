"""Feed-forward parts: the dense MLP of the first layers, and the mixture of experts.

The routed experts are reached through one callable, `Experts`. Local experts are a grouped matmul;
experts on other ranks are the same callable with an exchange inside. Nothing else of the model
knows where an expert lives.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from rayseek.kernels.ops import Norm, Ops, Weight
from rayseek.model.checkpoint import Weights
from rayseek.model.config import ModelConfig


class Experts(Protocol):
    """The routed experts of one layer."""

    def __call__(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, into_TD: Tensor) -> None:
        """into[t] += sum over k of weight[t, k] * expert[t, k](x[t]), in ascending expert order.

        x_TD, weight_TK, into_TD: float32; expert_TK: int32 logical experts, ascending in a row.
        """


class FeedForward(Protocol):
    """x -> x + ffn(norm(x)), dense or with experts."""

    def __call__(self, x_TD: Tensor) -> Tensor: ...


def _gate_up(weights: Weights, prefix: str) -> list[Weight]:
    return [weights.weight(f"{prefix}.{name}_proj.weight") for name in ("gate", "up")]


class DenseMLP:
    """down(silu(gate x) * up x) on the normalised input, with the residual."""

    def __init__(self, weights: Weights, prefix: str, norm: Norm, ops: Ops) -> None:
        self.ops, self.norm = ops, norm
        self.gate_up = ops.pack_stack(_gate_up(weights, f"{prefix}.mlp"))
        self.down = ops.pack(weights.weight(f"{prefix}.mlp.down_proj.weight"))

    def __call__(self, x_TD: Tensor) -> Tensor:
        return x_TD + self.ops.mlp(self.ops.rms_norm(x_TD, self.norm), self.gate_up, self.down)


class LocalExperts:
    """All routed experts of a layer on this device."""

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str, ops: Ops) -> None:
        self.ops = ops
        names = [f"{prefix}.mlp.experts.{e}" for e in range(config.n_routed_experts)]
        self.packed = ops.pack_experts(
            [_gate_up(weights, name) for name in names],
            [weights.weight(f"{name}.down_proj.weight") for name in names],
        )

    def __call__(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, into_TD: Tensor) -> None:
        self.ops.experts(x_TD, expert_TK, weight_TK, self.packed, into_TD)


class MoE:
    """Router, shared expert and routed experts, with the residual (spec sections 1.5, 1.6)."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        prefix: str,
        norm: Norm,
        ops: Ops,
        experts: Experts,
    ) -> None:
        self.config, self.ops, self.norm, self.experts = config, ops, norm, experts
        self.gate = ops.pack(weights.weight(f"{prefix}.mlp.gate.weight"))
        self.bias_E = weights.tensor(f"{prefix}.mlp.gate.e_score_correction_bias").float()
        shared = f"{prefix}.mlp.shared_experts"
        self.shared_gate_up = ops.pack_stack(_gate_up(weights, shared))
        self.shared_down = ops.pack(weights.weight(f"{shared}.down_proj.weight"))

    def __call__(self, x_TD: Tensor) -> Tensor:
        ops, c = self.ops, self.config
        normed = ops.rms_norm(x_TD, self.norm)
        expert_TK, weight_TK = ops.route(
            ops.linear(normed, self.gate), self.bias_E, c.n_group, c.topk_group,
            c.num_experts_per_tok, c.norm_topk_prob, c.routed_scaling_factor,
        )  # fmt: skip
        out_TD = x_TD + ops.mlp(normed, self.shared_gate_up, self.shared_down)
        self.experts(normed, expert_TK, weight_TK, out_TD)
        return out_TD
