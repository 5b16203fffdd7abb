"""The multi-token-prediction module: layer N of the checkpoint, one token further ahead.

Given the main model's hidden state at position i and the token at i + 1, it predicts the token at
i + 2 (spec section 2). Embedding and head are the main model's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayseek.kernels.ops import Norm, Ops, PassParts
from rayseek.model.batch import Batch
from rayseek.model.checkpoint import Weights
from rayseek.model.config import ModelConfig
from rayseek.model.moe import LocalExperts
from rayseek.model.transformer import Block, ExpertsFactory, Transformer


class MTPModule:
    """Draft module over its own layer of KV pages."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        ops: Ops,
        main: Transformer,
        experts: ExpertsFactory | None = None,
    ) -> None:
        layer = config.num_hidden_layers
        prefix = f"model.layers.{layer}"
        self.ops, self.main = ops, main

        def norm(name: str) -> Norm:
            return Norm(weights.tensor(f"{prefix}.{name}.weight").float(), config.rms_norm_eps)

        self.embedding_norm, self.hidden_norm = norm("enorm"), norm("hnorm")
        self.eh_proj = ops.pack(weights.weight(f"{prefix}.eh_proj.weight"))
        self.block = Block(
            config, weights, layer, ops, "absorbed",
            experts or (lambda p: LocalExperts(config, weights, p, ops)),
        )  # fmt: skip
        self.final_norm = norm("shared_head.norm")

    @property
    def parts(self) -> PassParts | None:
        """What a whole pass of this module needs; None where it would not be the same."""
        join = self.embedding_norm, self.eh_proj, self.hidden_norm
        return self.main.pass_of([self.block], self.final_norm, join)

    def __call__(self, batch: Batch, hidden_TD: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Draft logits float32 [R, V] and normed states [R, D] of the out rows."""
        rows_R = None if len(batch.out_rows_R) == len(batch.ids_T) else batch.out_rows_R
        normed_RD = self.states(batch, hidden_TD, pages, rows_R)
        return self.ops.linear(normed_RD, self.main.head), normed_RD

    def states(
        self, batch: Batch, hidden_TD: Tensor, pages: Tensor, rows_R: Tensor | None = None
    ) -> Tensor:
        """The states [T, D] that the head makes draft logits of; writes `pages`.

        batch: ids are the tokens at i + 1, positions those of the hidden states i.
        hidden_TD: the main model's states after its final norm, or this module's own output when
        drafting further (spec 2.2: normed states are recycled). pages: of this module.
        rows_R: the only rows whose states are computed; the others just write their latents.
        """
        ops, main = self.ops, self.main
        x_TD = self._joined(batch, hidden_TD)
        x_TD = self.block.attend(x_TD, batch, pages, main.cos_sin_PR, rows_R)
        x_TD = self.block.feed_forward(x_TD)
        return ops.rms_norm(x_TD, self.final_norm)

    def remember(self, batch: Batch, hidden_TD: Tensor, pages: Tensor) -> None:
        """Write the latents that `__call__` would, and compute nothing else: one layer deep, they
        depend on no other row."""
        x_TD = self._joined(batch, hidden_TD)
        self.block.attend.remember(x_TD, batch, pages, self.main.cos_sin_PR)

    def _joined(self, batch: Batch, hidden_TD: Tensor) -> Tensor:
        """What enters the layer: token and hidden state, each normed, as one vector."""
        ops = self.ops
        embedded_TD = self.main.embed_VD[batch.ids_T].float()
        both = torch.cat(  # embedding first: the order of the checkpoint, not of the paper's eq. 21
            [
                ops.rms_norm(embedded_TD, self.embedding_norm),
                ops.rms_norm(hidden_TD, self.hidden_norm),
            ],
            dim=1,
        )
        return ops.linear(both, self.eh_proj)
