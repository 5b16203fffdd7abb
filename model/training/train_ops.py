"""`TrainOps`: the operations of the model made differentiable, for the model code that serves.

A packed weight is a trainable leaf: matrices in the compute dtype (bf16 on CPU and CUDA), norms,
router and embedding in float32. Pages become a holder of the batch's own latents, since a training
batch has no past; `attend` expands them (the naive form), which needs no cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from rayseek.kernels.ops import Norm, Weight
from rayseek.kernels.rms_norm import rms_norm_ref
from rayseek.kernels.rope import rotate_ref
from rayseek.model.training.attention import RowAttention, row_mask
from rayseek.model.training.grouped import GroupedExperts, plan_dispatch


@dataclass(slots=True)
class Leaf:
    """One trainable tensor, and the checkpoint tensors that lie in it one after the other."""

    names: list[str]
    tensor: Tensor  # in the dtype it is computed with; requires grad


@dataclass(slots=True)
class Rows:
    """Stands for a layer's pages: what `store_latents` hands to the `attend` after it."""

    latent_TC: Tensor | None = None
    key_TR: Tensor | None = None


@dataclass(slots=True)
class Loads:
    """What the routers of one forward pass did, in the order of the layers."""

    count_E: list[Tensor] = field(default_factory=list)  # int64 tokens of each expert
    balance: list[Tensor] = field(default_factory=list)  # sequence-wise loss, before its factor


class TrainOps:
    """`Ops` for training. Not a protocol subclass in name only: serving code runs on it as it is.

    tensors: initial values by checkpoint name, float32; those that the model uses directly (norms,
    embedding) must be leaves already. Call `begin` before each batch.
    """

    name = "train"

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.row_tokens = 0
        self.mask_B1LL = torch.empty(0)
        self.leaves: list[Leaf] = []
        self.loads = Loads()
        self._names = {id(tensor): name for name, tensor in tensors.items()}

    def begin(self, row_tokens: int, position_T: Tensor) -> None:
        """A new batch: rows of so many tokens, and each token's position in its document."""
        self.row_tokens = row_tokens
        self.mask_B1LL = row_mask(position_T.view(-1, row_tokens), self.dtype)
        self.loads = Loads()

    def pack(self, weight: Weight) -> Tensor:
        name = self._names[id(weight.data)]
        router = name.endswith("mlp.gate.weight")
        return self._leaf([name], weight.data, torch.float32 if router else self.dtype)

    def pack_stack(self, weights: list[Weight]) -> Tensor:
        names = [self._names[id(w.data)] for w in weights]
        return self._leaf(names, torch.cat([w.data for w in weights]), self.dtype)

    def pack_heads(self, kv_b: Weight, heads: int, nope: int, value: int) -> tuple[Tensor, int]:
        return self.pack(kv_b), nope

    def pack_experts(
        self, gate_up: list[list[Weight]], down: list[Weight]
    ) -> tuple[Tensor, Tensor]:
        pairs = torch.stack([torch.cat([w.data for w in pair]) for pair in gate_up])
        pair_names = [self._names[id(w.data)] for pair in gate_up for w in pair]
        down_names = [self._names[id(w.data)] for w in down]
        return (
            self._leaf(pair_names, pairs, self.dtype),
            self._leaf(down_names, torch.stack([w.data for w in down]), self.dtype),
        )

    def _leaf(self, names: list[str], value: Tensor, dtype: torch.dtype) -> Tensor:
        leaf = value.detach().to(dtype, copy=True).requires_grad_()
        self.leaves.append(Leaf(names, leaf))
        return leaf

    def linear(
        self, x_TK: Tensor, w: Tensor, norm: Norm | None = None, residual_TN: Tensor | None = None
    ) -> Tensor:
        x = (x_TK if norm is None else self.rms_norm(x_TK, norm)).to(w.dtype)
        y = x @ w.T
        return y if residual_TN is None else (y + residual_TN).to(self.dtype)

    def rms_norm(self, x_TD: Tensor, norm: Norm) -> Tensor:
        return rms_norm_ref(x_TD, norm).to(self.dtype)

    def store_latents(
        self, ckr_TX: Tensor, norm: Norm, cos_sin_PR: Tensor, positions_T: Tensor,
        slots_T: Tensor, pages: Rows,
    ) -> None:  # fmt: skip
        latent, key = ckr_TX.split([norm.weight_K.numel(), cos_sin_PR.shape[1]], dim=-1)
        pages.latent_TC = self.rms_norm(latent, norm)
        pages.key_TR = rotate_ref(key, cos_sin_PR[positions_T]).to(self.dtype)

    def attend(
        self, q_THW: Tensor, w_uk: Tensor, w_uv: int, cos_sin_PR: Tensor, pages: Rows,
        page_table_BP: Tensor, sequence_T: Tensor, positions_T: Tensor, scale: float,
    ) -> Tensor:  # fmt: skip
        kv_b, nope, length = w_uk, w_uv, self.row_tokens
        tokens, heads, _ = q_THW.shape
        latent_TC, key_TR = pages.latent_TC, pages.key_TR
        assert latent_TC is not None and key_TR is not None
        cos_sin = cos_sin_PR[positions_T][:, None]
        rotated = rotate_ref(q_THW[..., nope:], cos_sin).to(self.dtype)
        q_THW = torch.cat([q_THW[..., :nope], rotated], dim=-1)
        kv_THW = (latent_TC @ kv_b.T).view(tokens, heads, -1)
        key_THR = key_TR[:, None].expand(-1, heads, -1)
        k_THW = torch.cat([kv_THW[..., :nope], key_THR], dim=-1)

        def by_row(x_THW: Tensor) -> Tensor:
            return x_THW.view(-1, length, heads, x_THW.shape[-1]).transpose(1, 2).contiguous()

        q, k, v = by_row(q_THW), by_row(k_THW), by_row(kv_THW[..., nope:])
        out_BHLV: Tensor = _attention(q, k, v, self.mask_B1LL, scale)
        return out_BHLV.transpose(1, 2).reshape(tokens, -1)

    def route(
        self, logits_TE: Tensor, bias_E: Tensor, groups: int, keep_groups: int, top_k: int,
        normalise: bool, factor: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        score_TE = logits_TE.float().sigmoid()
        score_ET = score_TE.detach().T.contiguous()
        self.loads.balance.append(sequence_balance(score_TE, score_ET, top_k, self.row_tokens))
        chosen_ET = choose(score_ET + bias_E.to(score_ET)[:, None], groups, keep_groups, top_k)
        expert_TK = in_order(chosen_ET, top_k)
        ids_E = torch.arange(len(score_ET), dtype=torch.int32, device=score_ET.device)
        picked_TKE = expert_TK[:, :, None] == ids_E
        weight_TK = torch.where(picked_TKE, score_TE[:, None], 0.0).sum(-1)
        if normalise:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        return expert_TK, weight_TK * factor

    def mlp(self, x_TD: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = (x_TD @ gate_up.T).float().chunk(2, dim=-1)
        return (F.silu(gate) * up).to(self.dtype) @ down.T

    def experts(
        self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor,
        packed: tuple[Tensor, Tensor], into_TD: Tensor,
    ) -> None:  # fmt: skip
        into_TD += _experts(x_TD, expert_TK, weight_TK, packed, self.loads)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    out: Tensor = RowAttention.apply(q, k, v, mask, scale)  # type: ignore[no-untyped-call]
    return out


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _experts(
    x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, packed: tuple[Tensor, Tensor], loads: Loads
) -> Tensor:
    gate_up, down = packed
    plan = plan_dispatch(expert_TK, len(down))
    loads.count_E.append(plan.count_E)
    out: Tensor = GroupedExperts.apply(x_TD, weight_TK, gate_up, down, plan)  # type: ignore[no-untyped-call]
    return out


def rank(score: list[Tensor]) -> list[Tensor]:
    """For each of n tensors, element by element, how many of the others come before it in
    descending order; equals keep their order. Comparisons, not a sort, so that they fuse."""
    ranks = []
    for i, this in enumerate(score):
        before = [(other >= this) for other in score[:i]] + [(o > this) for o in score[i + 1 :]]
        ranks.append(_total(before) if before else torch.zeros_like(this))
    return ranks


def _total(flags: list[Tensor]) -> Tensor:
    total = flags[0].float()
    for flag in flags[1:]:
        total = total + flag.float()
    return total


def choose(biased_ET: Tensor, groups: int, keep_groups: int, top_k: int) -> Tensor:
    """Float [E, T], 1 where a token chooses an expert.

    The same choice as `route_ref` (spec section 1.6), tie rules included.
    """
    rows = list(biased_ET.unbind())
    size = len(rows) // groups
    members = [rows[g * size : (g + 1) * size] for g in range(groups)]
    best_two = []
    for group in members:
        pairs = [a + b for i, a in enumerate(group) for b in group[:i]]
        best = pairs[0]
        for pair in pairs[1:]:
            best = torch.maximum(best, pair)
        best_two.append(best)
    kept = [r < keep_groups for r in rank(best_two)]
    masked = [torch.where(kept[i // size], row, -torch.inf) for i, row in enumerate(rows)]
    return torch.stack([(r < top_k).float() for r in rank(masked)])


def in_order(chosen_ET: Tensor, top_k: int) -> Tensor:
    """int32 [T, K]: the chosen experts of each token, ascending."""
    found = torch.zeros_like(chosen_ET[0])
    picks = [torch.zeros_like(found) for _ in range(top_k)]
    for expert, chosen in enumerate(chosen_ET.unbind()):
        for k in range(top_k):
            picks[k] = picks[k] + torch.where((chosen > 0) & (found == k), float(expert), 0.0)
        found = found + chosen
    return torch.stack(picks, dim=1).int()


def sequence_balance(score_TE: Tensor, score_ET: Tensor, top_k: int, length: int) -> Tensor:
    """Mean over rows of sum f_e P_e (spec section 3): 1 when balanced. Gradient through P only.

    score_ET: the same scores without gradient.
    """
    experts, tokens = score_ET.shape
    chosen_ET = torch.stack([(r < top_k).float() for r in rank(list(score_ET.unbind()))])
    share_BE = chosen_ET.view(experts, -1, length).mean(-1).T * (experts / top_k)
    probability_TE = score_TE / score_TE.sum(-1, keepdim=True)
    mean_BE = probability_TE.view(-1, length, experts).mean(1)
    return (share_BE * mean_BE).sum(-1).mean()
