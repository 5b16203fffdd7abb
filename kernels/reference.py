"""`ReferenceOps`: every operation by its plain PyTorch reference, in float32.

The specification of the others and the path that always works. It is not batch invariant: torch
picks the order of a sum by the shape of the whole call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayseek.kernels.experts import combine_ref, expert_rows_ref, experts_ref, mlp_ref
from rayseek.kernels.fp8 import dequantise_ref
from rayseek.kernels.kv_format import PAGE_TOKENS, Fp8Token, KVDtype
from rayseek.kernels.latent_pages import read_pages_ref, store_latents_ref
from rayseek.kernels.linear import linear_ref
from rayseek.kernels.mla_attention import (
    absorb_ref,
    mla_attention_ref,
    split_heads_ref,
    unabsorb_ref,
)
from rayseek.kernels.ops import Norm, Weight
from rayseek.kernels.rms_norm import rms_norm_ref
from rayseek.kernels.router import route_ref


class ReferenceOps:
    """`Ops` in plain PyTorch; a packed weight is its float32 values."""

    name = "reference"
    fp8_rows = False

    def __init__(self, kv_dtype: KVDtype = "auto") -> None:
        self.kv_dtype = kv_dtype

    def pack(self, weight: Weight) -> Tensor:
        return dequantise_ref(weight)

    def pack_stack(self, weights: list[Weight]) -> Tensor:
        return torch.cat([dequantise_ref(weight) for weight in weights])

    def pack_heads(self, kv_b: Weight, heads: int, nope: int, value: int) -> tuple[Tensor, Tensor]:
        return split_heads_ref(dequantise_ref(kv_b), heads, nope, value)

    def pack_experts(
        self, gate_up: list[list[Weight]], down: list[Weight]
    ) -> tuple[list[Tensor], list[Tensor]]:
        return [self.pack_stack(pair) for pair in gate_up], [self.pack(w) for w in down]

    def linear(
        self, x_TK: Tensor, w: Tensor, norm: Norm | None = None, residual_TN: Tensor | None = None
    ) -> Tensor:
        return linear_ref(x_TK, w, norm, residual_TN)

    def rms_norm(self, x_TD: Tensor, norm: Norm) -> Tensor:
        return rms_norm_ref(x_TD, norm)

    def new_pages(self, count: int, latent: int, rope: int) -> Tensor:
        if self.kv_dtype == "fp8":
            return torch.zeros(count, PAGE_TOKENS, Fp8Token(latent, rope).size, dtype=torch.uint8)
        return torch.zeros(count, PAGE_TOKENS, latent + rope)

    def read_latents(self, pages: Tensor, page_ids: Tensor, latent: int, rope: int) -> Tensor:
        return read_pages_ref(pages[page_ids.long()], latent, rope).flatten(0, 1)

    def store_latents(
        self, ckr_TX: Tensor, norm: Norm, cos_sin_PR: Tensor, positions_T: Tensor,
        slots_T: Tensor, pages: Tensor,
    ) -> None:  # fmt: skip
        store_latents_ref(ckr_TX, norm, cos_sin_PR, positions_T, slots_T, pages)

    def attend(
        self, q_THW: Tensor, w_uk: Tensor, w_uv: Tensor, cos_sin_PR: Tensor, pages: Tensor,
        page_table_BP: Tensor, sequence_T: Tensor, positions_T: Tensor, scale: float,
    ) -> Tensor:  # fmt: skip
        q_THX = absorb_ref(q_THW, w_uk, cos_sin_PR, positions_T)
        u_THC = mla_attention_ref(
            q_THX, pages, page_table_BP, sequence_T, positions_T, scale, w_uk.shape[2]
        )
        return unabsorb_ref(u_THC, w_uv)

    def route(
        self, logits_TE: Tensor, bias_E: Tensor, groups: int, keep_groups: int, top_k: int,
        normalise: bool, factor: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return route_ref(logits_TE, bias_E, groups, keep_groups, top_k, normalise, factor)

    def mlp(self, x_TD: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return mlp_ref(x_TD, gate_up, down)

    def experts(
        self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor,
        packed: tuple[list[Tensor], list[Tensor]], into_TD: Tensor,
    ) -> None:  # fmt: skip
        gate_up, down = packed
        experts_ref(x_TD, expert_TK, weight_TK, gate_up, down, into_TD)

    def join_experts(
        self, parts: list[tuple[list[Tensor], list[Tensor]]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        return [w for part in parts for w in part[0]], [w for part in parts for w in part[1]]

    def expert_part(
        self, packed: tuple[list[Tensor], list[Tensor]], index: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        return [packed[0][index]], [packed[1][index]]

    def row_words(self, x_TD: Tensor) -> Tensor:
        return x_TD.view(torch.int32)

    def expert_rows(
        self, x_RW: Tensor, row_N: Tensor, expert_N: Tensor,
        packed: tuple[list[Tensor], list[Tensor]],
    ) -> Tensor:  # fmt: skip
        return expert_rows_ref(x_RW.view(torch.float32), row_N, expert_N, *packed)

    def combine(self, y_MD: Tensor, index_TK: Tensor, weight_TK: Tensor, into_TD: Tensor) -> None:
        combine_ref(y_MD, index_TK, weight_TK, into_TD)
