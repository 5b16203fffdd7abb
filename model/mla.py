"""Multi-head latent attention over the paged latent cache, in its two equal forms.

The absorbed form works on latents throughout: one 576-wide key for all heads, whose first 512
values are also the value. The naive form expands latents to per-head keys and values first; it is
cheaper for long prompts and is the textbook statement of the same thing (spec section 1.3).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from rayseek.kernels.ops import Norm, Ops
from rayseek.kernels.rope import rotate_ref
from rayseek.model.batch import PAGE_TOKENS, Batch
from rayseek.model.checkpoint import Weights
from rayseek.model.config import ModelConfig

Form = Literal["absorbed", "naive"]


class MLA:
    """Attention of one layer, its input norm included: x -> x + attention(norm(x))."""

    def __init__(
        self, config: ModelConfig, weights: Weights, prefix: str, ops: Ops, form: Form = "absorbed"
    ) -> None:
        self.config, self.ops, self.form = config, ops, form
        eps = config.rms_norm_eps

        def norm(name: str) -> Norm:
            return Norm(weights.tensor(f"{prefix}.{name}.weight").float(), eps)

        attn = f"{prefix}.self_attn"
        self.input_norm = norm("input_layernorm")
        self.kv_norm = norm("self_attn.kv_a_layernorm")
        kv_a = weights.weight(f"{attn}.kv_a_proj_with_mqa.weight")
        self.q_b: Any = None
        self.q_norm: Norm | None = None
        if config.q_lora_rank is None:
            self.q_width = config.num_attention_heads * config.qk_head_dim
            first = weights.weight(f"{attn}.q_proj.weight")
        else:
            self.q_width = config.q_lora_rank
            first = weights.weight(f"{attn}.q_a_proj.weight")
            self.q_norm = norm("self_attn.q_a_layernorm")
            self.q_b = ops.pack(weights.weight(f"{attn}.q_b_proj.weight"))
        self.q_and_kv_a = ops.pack_stack([first, kv_a])
        kv_b = weights.weight(f"{attn}.kv_b_proj.weight")
        self.w_uk, self.w_uv = ops.pack_heads(
            kv_b, config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
        )
        self.kv_b = ops.pack(kv_b) if form == "naive" else None
        self.o = ops.pack(weights.weight(f"{attn}.o_proj.weight"))

    def __call__(
        self,
        x_TD: Tensor,
        batch: Batch,
        pages: Tensor,
        cos_sin_PR: Tensor,
        rows_R: Tensor | None = None,
    ) -> Tensor:
        """x_TD float32 -> [T, D]; writes the rows' latents into `pages` first.

        rows_R: int64, the only rows that go on from there: [R, D].
        """
        ops, c = self.ops, self.config
        q = self.remember(x_TD, batch, pages, cos_sin_PR)
        sequence, positions = batch.sequence_T, batch.positions_T
        if rows_R is not None:
            x_TD, q, sequence = x_TD[rows_R], q[rows_R], sequence[rows_R]
            positions = positions[rows_R]
        if self.q_b is not None:
            q = ops.linear(q, self.q_b, norm=self.q_norm)
        q_THW = q.reshape(len(x_TD), c.num_attention_heads, c.qk_head_dim)
        if self.form == "naive":
            assert rows_R is None, "the naive form computes every row"
            heads = self._naive(q_THW, batch, pages, cos_sin_PR)
        else:
            heads = ops.attend(
                q_THW, self.w_uk, self.w_uv, cos_sin_PR, pages, batch.page_table_BP,
                sequence, positions, c.softmax_scale,
            )  # fmt: skip
        return ops.linear(heads, self.o, residual_TN=x_TD)

    def remember(self, x_TD: Tensor, batch: Batch, pages: Tensor, cos_sin_PR: Tensor) -> Tensor:
        """Write the rows' latents; returns their first query projection [T, Q]."""
        a = self.ops.linear(x_TD, self.q_and_kv_a, norm=self.input_norm)
        self.ops.store_latents(
            a[:, self.q_width :], self.kv_norm, cos_sin_PR, batch.positions_T, batch.slots_T, pages
        )
        return a[:, : self.q_width]

    def _naive(self, q_THW: Tensor, batch: Batch, pages: Tensor, cos_sin_PR: Tensor) -> Tensor:
        """Expand each sequence's cached latents to keys and values; plain attention."""
        c = self.config
        nope, heads = c.qk_nope_head_dim, c.num_attention_heads
        cos_sin = cos_sin_PR[batch.positions_T.long()][:, None]
        q_THW = torch.cat([q_THW[..., :nope], rotate_ref(q_THW[..., nope:], cos_sin)], dim=-1)
        out_THV = q_THW.new_empty(len(q_THW), heads, c.v_head_dim)
        for b in batch.sequence_T.unique().tolist():
            rows = (batch.sequence_T == b).nonzero().flatten()
            limit_T = batch.positions_T[rows].long()
            length = int(limit_T.max()) + 1
            used = batch.page_table_BP[b, : -(-length // PAGE_TOKENS)]
            cached_SX = self.ops.read_latents(pages, used, c.kv_lora_rank, c.qk_rope_head_dim)[
                :length
            ]
            kv = self.ops.linear(cached_SX[:, : c.kv_lora_rank], self.kv_b)
            kv_SHW = kv.view(len(cached_SX), heads, nope + c.v_head_dim)
            kr_S1R = cached_SX[:, None, c.kv_lora_rank :].expand(-1, heads, -1)
            k_SHW = torch.cat([kv_SHW[..., :nope], kr_S1R], dim=-1)
            scores_HTS = torch.einsum("thw,shw->hts", q_THW[rows], k_SHW) * c.softmax_scale
            key_S = torch.arange(len(cached_SX), device=limit_T.device)
            future_TS = key_S[None, :] > limit_T[:, None]
            probs_HTS = scores_HTS.masked_fill(future_TS, -torch.inf).softmax(dim=-1)
            out_THV[rows] = torch.einsum("hts,shv->thv", probs_HTS, kv_SHW[..., nope:])
        return out_THV.flatten(1)
