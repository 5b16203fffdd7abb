"""DeepSeek-V3: embedding, layers of attention and feed-forward, final norm, head.

One process, one device, no globals: a `Batch` goes in, hidden states and logits come out. How many
processes take part is hidden behind the `Experts` callable (see `moe.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rayseek.kernels.ops import LayerParts, Norm, Ops, PassParts
from rayseek.kernels.rope import yarn_cos_sin
from rayseek.model.batch import Batch
from rayseek.model.checkpoint import Weights
from rayseek.model.config import ModelConfig
from rayseek.model.latent_cache import LatentCache
from rayseek.model.micro_batches import run_blocks
from rayseek.model.mla import MLA, Form
from rayseek.model.moe import DenseMLP, Experts, LocalExperts, MoE

ExpertsFactory = Callable[[str], Experts]


def rope_table(config: ModelConfig, positions: int) -> Tensor:
    """cos_sin_PR float32 [positions, R]; YaRN whenever the config has it (spec section 1.4)."""
    dim, theta, yarn = config.qk_rope_head_dim, config.rope_theta, config.yarn
    if yarn is None:
        return yarn_cos_sin(positions, dim, theta, 1.0, positions)
    return yarn_cos_sin(
        positions, dim, theta, yarn.factor, yarn.original_max_position_embeddings,
        yarn.beta_fast, yarn.beta_slow,
    )  # fmt: skip


class Block:
    """One layer: `attend`, then `feed_forward`, each with its norm and residual."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        layer: int,
        ops: Ops,
        form: Form,
        experts: ExpertsFactory,
    ) -> None:
        prefix = f"model.layers.{layer}"
        self.attend = MLA(config, weights, prefix, ops, form)
        norm = Norm(
            weights.tensor(f"{prefix}.post_attention_layernorm.weight").float(),
            config.rms_norm_eps,
        )
        self.feed_forward: DenseMLP | MoE
        if config.is_moe(layer):
            self.feed_forward = MoE(config, weights, prefix, norm, ops, experts(prefix))
        else:
            self.feed_forward = DenseMLP(weights, prefix, norm, ops)

    @property
    def parts(self) -> LayerParts | None:
        """What a whole pass needs of this layer; None where it would not be the same."""
        a, ffn = self.attend, self.feed_forward
        if a.form != "absorbed":
            return None
        attention = (
            a.input_norm, a.q_and_kv_a, a.q_norm, a.q_b, a.kv_norm, a.w_uk, a.w_uv, a.o, ffn.norm,
        )  # fmt: skip
        if isinstance(ffn, DenseMLP):
            return LayerParts(*attention, ffn.gate_up, ffn.down, None)
        moe = ffn.parts
        if moe is None:
            return None
        return LayerParts(*attention, ffn.shared_gate_up, ffn.shared_down, moe)


class Transformer:
    """The main model on one device.

    max_positions: longest sequence to be served (rows of the rope table).
    experts: makes the routed experts of a layer from its name prefix; local ones by default.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        ops: Ops,
        max_positions: int,
        form: Form = "absorbed",
        experts: ExpertsFactory | None = None,
    ) -> None:
        self.config, self.ops = config, ops

        def local(prefix: str) -> Experts:
            return LocalExperts(config, weights, prefix, ops)

        self.embed_VD = weights.tensor("model.embed_tokens.weight")
        self.cos_sin_PR = rope_table(config, max_positions).to(self.embed_VD.device)
        self.blocks = [
            Block(config, weights, layer, ops, form, experts or local)
            for layer in range(config.num_hidden_layers)
        ]
        self.final_norm = Norm(weights.tensor("model.norm.weight").float(), config.rms_norm_eps)
        self.head = ops.pack(weights.weight("lm_head.weight"))

    @property
    def parts(self) -> PassParts | None:
        """What a whole pass of this model needs; None where it would not be the same."""
        return self.pass_of(self.blocks, self.final_norm)

    def pass_of(
        self, blocks: list[Block], final_norm: Norm, join: tuple[Norm, Any, Norm] | None = None
    ) -> PassParts | None:
        """The same for other blocks between this model's embedding and head."""
        layers = [layer for block in blocks if (layer := block.parts) is not None]
        if len(layers) < len(blocks) or not self.embed_VD.is_contiguous():
            return None
        return PassParts(
            self.embed_VD, join, layers, final_norm, self.head, self.cos_sin_PR,
            self.config.softmax_scale,
        )  # fmt: skip

    def hidden(self, batch: Batch, layers: list[Tensor], micro_batches: int = 1) -> Tensor:
        """Hidden states float32 [T, D] before the final norm; writes the pages of its layers.

        micro_batches: in how many parts the rows go through the layers, taking turns.
        """
        x_TD = self.embed_VD[batch.ids_T].float()
        if micro_batches > 1:
            return run_blocks(self.blocks, x_TD, batch, layers, self.cos_sin_PR, micro_batches)
        for block, pages in zip(self.blocks, layers, strict=True):
            x_TD = block.attend(x_TD, batch, pages, self.cos_sin_PR)
            x_TD = block.feed_forward(x_TD)
        return x_TD

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """float32 [R, V] of hidden states before the final norm."""
        return self.ops.linear(hidden_RD, self.head, norm=self.final_norm)

    def __call__(self, batch: Batch, cache: LatentCache) -> Tensor:
        """Logits float32 [R, V] of the batch's out rows."""
        x_TD = self.hidden(batch, cache.layers)
        if len(batch.out_rows_R) != len(x_TD):
            x_TD = x_TD[batch.out_rows_R]
        return self.logits(x_TD)
