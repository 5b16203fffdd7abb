"""Feed-forward parts: the dense MLP of the first layers, and the mixture of experts.

The routed experts are reached through one interface, `Experts`. Local experts are a grouped matmul;
experts on other ranks are the same interface with an exchange inside. Nothing else of the model
knows where an expert lives. It has three steps, so that others can compute while rows travel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from rayseek.kernels.ops import MoeParts, Norm, Ops, Weight
from rayseek.model.checkpoint import Weights
from rayseek.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class ExpertsHere:
    """All experts of a layer as one packed value.

    rows_E: int64, in which the rows of each are to be counted, if they are.
    """

    packed: Any
    rows_E: Tensor | None = None


class Experts(Protocol):
    """The routed experts of one layer."""

    @property
    def here(self) -> ExpertsHere | None:
        """The experts themselves, if all are in this process; `begin` is then one way of many."""

    def begin(self, x_TD: Tensor, expert_TK: Tensor) -> ExpertsUnderway:
        """Start on normalised rows for int32 logical experts, ascending in a row."""


class ExpertsUnderway(Protocol):
    """Rows that are with their experts; `compute`, then `add`, each once."""

    def compute(self) -> None:
        """Do this process's share of the work, for whosever rows are here."""

    def add(self, weight_TK: Tensor, into_TD: Tensor) -> None:
        """into[t] += sum over k of weight[t, k] * expert[t, k](x[t]), in ascending expert order."""


class Underway(Protocol):
    """A feed-forward part that was begun; `compute`, then `result`, each once."""

    def compute(self) -> None: ...

    def result(self) -> Tensor: ...


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

    def begin(self, x_TD: Tensor) -> Underway:
        return _Done(self(x_TD))


@dataclass(frozen=True, slots=True)
class _Done:
    value_TD: Tensor

    def compute(self) -> None:
        pass

    def result(self) -> Tensor:
        return self.value_TD


class LocalExperts:
    """All routed experts of a layer on this device."""

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str, ops: Ops) -> None:
        self.ops = ops
        names = [f"{prefix}.mlp.experts.{e}" for e in range(config.n_routed_experts)]
        self.packed = ops.pack_experts(
            [_gate_up(weights, name) for name in names],
            [weights.weight(f"{name}.down_proj.weight") for name in names],
        )

    @property
    def here(self) -> ExpertsHere:
        return ExpertsHere(self.packed)

    def begin(self, x_TD: Tensor, expert_TK: Tensor) -> ExpertsUnderway:
        return _LocalRows(self, x_TD, expert_TK)


@dataclass(frozen=True, slots=True)
class _LocalRows:
    experts: LocalExperts
    x_TD: Tensor
    expert_TK: Tensor

    def compute(self) -> None:
        """All at once in `add`, which needs no memory for the products."""

    def add(self, weight_TK: Tensor, into_TD: Tensor) -> None:
        here = self.experts
        here.ops.experts(self.x_TD, self.expert_TK, weight_TK, here.packed, into_TD)


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

    @property
    def parts(self) -> MoeParts | None:
        """What routes and the routed experts; None where they are not all here."""
        c, here = self.config, self.experts.here
        if here is None:
            return None
        return MoeParts(
            self.gate, self.bias_E, c.n_group, c.topk_group, c.num_experts_per_tok,
            c.norm_topk_prob, c.routed_scaling_factor, here.packed, here.rows_E,
        )  # fmt: skip

    def __call__(self, x_TD: Tensor) -> Tensor:
        under_way = self.begin(x_TD)
        under_way.compute()
        return under_way.result()

    def begin(self, x_TD: Tensor) -> Underway:
        """Routes first, so that rows can travel while the shared expert computes."""
        ops, c = self.ops, self.config
        normed = ops.rms_norm(x_TD, self.norm)
        expert_TK, weight_TK = ops.route(
            ops.linear(normed, self.gate), self.bias_E, c.n_group, c.topk_group,
            c.num_experts_per_tok, c.norm_topk_prob, c.routed_scaling_factor,
        )  # fmt: skip
        rows = self.experts.begin(normed, expert_TK)
        out_TD = x_TD + ops.mlp(normed, self.shared_gate_up, self.shared_down)
        return _Mixture(rows, weight_TK, out_TD)


@dataclass(frozen=True, slots=True)
class _Mixture:
    rows: ExpertsUnderway
    weight_TK: Tensor
    out_TD: Tensor  # everything but the routed experts

    def compute(self) -> None:
        self.rows.compute()

    def result(self) -> Tensor:
        self.rows.add(self.weight_TK, self.out_TD)
        return self.out_TD
