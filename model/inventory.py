"""Which tensors a checkpoint holds: names, shapes, dtypes and what each is for.

A pure function of the config; opens no file. The official config gives the official checkpoint's
91,991 tensors and 688,574,839,360 bytes (spec section 4.1).
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass
from enum import StrEnum

from rayseek.model.config import BLOCK, ModelConfig

ITEM_BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}  # dtypes by their safetensors names
SCALE_SUFFIX = "_scale_inv"  # "x.weight" has its scales in "x.weight_scale_inv"


class Kind(StrEnum):
    """What a tensor is part of. A scale has the kind of its weight."""

    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norms"
    ATTENTION = "attention"
    DENSE_MLP = "dense MLP"
    ROUTER = "router"
    SHARED_EXPERT = "shared expert"
    ROUTED_EXPERT = "routed experts"
    MTP_PROJECTION = "MTP projection"
    MTP_COPY = "MTP copies"  # of embedding and head: stored, never loaded (spec section 2.1)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor of the checkpoint; `layer` is None outside the layers, `expert` unless routed."""

    shape: tuple[int, ...]
    dtype: str  # "F8_E4M3", "BF16" or "F32"
    kind: Kind
    layer: int | None = None
    expert: int | None = None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * ITEM_BYTES[self.dtype]


def inventory(config: ModelConfig) -> dict[str, TensorSpec]:
    """Every tensor of the checkpoint by name, MTP modules included (spec sections 2.1, 4.1)."""
    d, vocab = config.hidden_size, config.vocab_size
    specs = {"model.embed_tokens.weight": TensorSpec((vocab, d), "BF16", Kind.EMBEDDING)}
    for layer in range(config.stored_layers):
        prefix = f"model.layers.{layer}."
        if layer >= config.num_hidden_layers:
            specs |= _mtp(prefix, layer, config)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            specs[f"{prefix}{norm}.weight"] = TensorSpec((d,), "BF16", Kind.NORM, layer)
        specs |= _attention(f"{prefix}self_attn.", layer, config)
        specs |= _mlp(f"{prefix}mlp.", layer, config)
    specs["model.norm.weight"] = TensorSpec((d,), "BF16", Kind.NORM)
    specs["lm_head.weight"] = TensorSpec((vocab, d), "BF16", Kind.HEAD)
    return specs


def owned_names(
    config: ModelConfig, experts: Mapping[int, Container[int]] | None = None
) -> list[str]:
    """The tensors that a rank loads: all but the MTP copies, and of the routed experts only
    experts[layer] (none in a layer left out). `experts` None: every expert."""
    return [
        name
        for name, spec in inventory(config).items()
        if spec.kind != Kind.MTP_COPY
        and (
            spec.expert is None
            or experts is None
            or (spec.layer is not None and spec.expert in experts.get(spec.layer, ()))
        )
    ]


def _mtp(prefix: str, layer: int, config: ModelConfig) -> dict[str, TensorSpec]:
    d, vocab = config.hidden_size, config.vocab_size
    norms = ("enorm", "hnorm", "shared_head.norm")
    copies = ("embed_tokens", "shared_head.head")
    return {
        **{f"{prefix}{n}.weight": TensorSpec((d,), "BF16", Kind.NORM, layer) for n in norms},
        f"{prefix}eh_proj.weight": TensorSpec((d, 2 * d), "BF16", Kind.MTP_PROJECTION, layer),
        **{
            f"{prefix}{n}.weight": TensorSpec((vocab, d), "BF16", Kind.MTP_COPY, layer)
            for n in copies
        },
    }


def _attention(prefix: str, layer: int, config: ModelConfig) -> dict[str, TensorSpec]:
    d, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    queries, rank = heads * config.qk_head_dim, config.q_lora_rank
    matrices = {
        "kv_a_proj_with_mqa": (config.latent_width, d),
        "kv_b_proj": (heads * (config.qk_nope_head_dim + config.v_head_dim), latent),
        "o_proj": (d, heads * config.v_head_dim),
    }
    norms = {"kv_a_layernorm": latent}
    if rank is None:
        matrices["q_proj"] = (queries, d)
    else:
        matrices |= {"q_a_proj": (rank, d), "q_b_proj": (queries, rank)}
        norms["q_a_layernorm"] = rank
    specs = {
        f"{prefix}{n}.weight": TensorSpec((width,), "BF16", Kind.NORM, layer)
        for n, width in norms.items()
    }
    for name, shape in matrices.items():
        specs |= _matrix(f"{prefix}{name}.weight", shape, Kind.ATTENTION, layer, None, config)
    return specs


def _mlp(prefix: str, layer: int, config: ModelConfig) -> dict[str, TensorSpec]:
    d, experts = config.hidden_size, config.n_routed_experts
    if not config.is_moe(layer):
        return _gated(prefix, config.intermediate_size, Kind.DENSE_MLP, layer, None, config)
    specs = {
        f"{prefix}gate.weight": TensorSpec((experts, d), "BF16", Kind.ROUTER, layer),
        f"{prefix}gate.e_score_correction_bias": TensorSpec((experts,), "F32", Kind.ROUTER, layer),
    }
    shared = config.shared_intermediate_size
    specs |= _gated(f"{prefix}shared_experts.", shared, Kind.SHARED_EXPERT, layer, None, config)
    width = config.moe_intermediate_size
    for expert in range(experts):
        name = f"{prefix}experts.{expert}."
        specs |= _gated(name, width, Kind.ROUTED_EXPERT, layer, expert, config)
    return specs


def _gated(
    prefix: str, width: int, kind: Kind, layer: int, expert: int | None, config: ModelConfig
) -> dict[str, TensorSpec]:
    d = config.hidden_size
    specs: dict[str, TensorSpec] = {}
    for name, shape in (
        ("gate_proj", (width, d)), ("up_proj", (width, d)), ("down_proj", (d, width))
    ):  # fmt: skip
        specs |= _matrix(f"{prefix}{name}.weight", shape, kind, layer, expert, config)
    return specs


def _matrix(
    name: str,
    shape: tuple[int, int],
    kind: Kind,
    layer: int,
    expert: int | None,
    config: ModelConfig,
) -> dict[str, TensorSpec]:
    """A weight that an FP8 checkpoint quantises, with its scales: one for each 128x128 block."""
    if not config.fp8_blocks:
        return {name: TensorSpec(shape, "BF16", kind, layer, expert)}
    blocks = tuple(-(-side // BLOCK) for side in shape)
    return {
        name: TensorSpec(shape, "F8_E4M3", kind, layer, expert),
        name + SCALE_SUFFIX: TensorSpec(blocks, "F32", kind, layer, expert),
    }
