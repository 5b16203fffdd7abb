"""Write a checkpoint in the official layout: shards, index, config, tokenizer.

Of given values, or of random ones. The same arguments give the same bytes: a random value depends
on the seed and the tensor's name only, so neither the number of shards nor the other tensors change
it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from rayseek.kernels.fp8 import quantise_blocks_ref
from rayseek.model.checkpoint import INDEX
from rayseek.model.config import ModelConfig, Yarn
from rayseek.model.inventory import SCALE_SUFFIX, Kind, TensorSpec, inventory
from rayseek.model.small_tokenizer import small_tokenizer

LOGIT_STD = 3.0  # spread enough that sampling has favourites and greedy has few near-ties
BIAS_STD = 0.1  # against scores whose std is 0.2: moves choices without deciding them
Values = Callable[[str, TensorSpec], Tensor]  # the float32 values of a tensor of the inventory
AWAY = 4  # every fourth scale lies one file after its weight, as happens in the official files

SMALL = ModelConfig(
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=768,
    moe_intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    first_k_dense_replace=1,
    n_routed_experts=16,
    n_shared_experts=1,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    q_lora_rank=128,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    max_position_embeddings=4096,
    num_nextn_predict_layers=1,
    yarn=Yarn(8.0, 512, beta_fast=32.0, beta_slow=1.0, mscale=1.0),
    fp8_blocks=True,
)
"""What `make serve` makes: ten million parameters, every mechanism of the real model."""

BENCH = replace(
    SMALL,
    vocab_size=4096,
    num_hidden_layers=8,
    num_attention_heads=8,
    n_routed_experts=32,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    fp8_blocks=False,
)
"""The model that speed is compared on; its latents have the real model's width of 576."""


def make_checkpoint(
    path: str | Path, config: ModelConfig, seed: int = 0, fp8: bool | None = None, shards: int = 4
) -> None:
    """Write a new checkpoint folder. fp8 None: as the config says.

    Raises FileExistsError if something is there already, ValueError if the vocabulary is too small
    for a tokenizer.
    """
    config = config if fp8 is None else replace(config, fp8_blocks=fp8)
    tokenizer = small_tokenizer(config.vocab_size)
    write_checkpoint(path, config, lambda name, spec: _values(name, spec, seed), tokenizer, shards)


def write_checkpoint(
    path: str | Path, config: ModelConfig, values: Values, tokenizer: tuple[str, str],
    shards: int = 4,
) -> None:  # fmt: skip
    """Write a checkpoint folder of these values, quantised if the config says so.

    values: of every tensor but the MTP module's copies. tokenizer: the texts of `tokenizer.json`
    and `tokenizer_config.json`. The folder appears at `path` only when it is complete. Raises
    FileExistsError if something is there already.
    """
    path = Path(path).absolute()
    if path.exists():
        raise FileExistsError(f"{path} exists; remove it or choose another path")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    shutil.rmtree(draft, ignore_errors=True)  # of a killed process that had our number
    draft.mkdir()
    try:
        _write(draft, "tokenizer.json", tokenizer[0])
        _write(draft, "tokenizer_config.json", tokenizer[1])
        _write(draft, "config.json", _json(config.to_dict()))
        _write_weights(draft, config, values, shards)
        draft.rename(path)
    except BaseException:
        shutil.rmtree(draft)
        raise


def _write_weights(folder: Path, config: ModelConfig, values: Values, shards: int) -> None:
    weight_map: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(_shards(config, values, shards), start=1):
        file = f"model-{number:05}-of-{shards:06}.safetensors"
        (folder / file).write_bytes(save(tensors, metadata={"format": "pt"}))
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write(folder, INDEX, _json(index))


def _shards(config: ModelConfig, values: Values, shards: int) -> Iterator[dict[str, Tensor]]:
    """The tensors of each file: runs of the inventory with about the same number of bytes."""
    specs = inventory(config)
    weights = [name for name in specs if not name.endswith(SCALE_SUFFIX)]
    total, written = sum(specs[name].bytes for name in weights), 0
    shard: dict[str, Tensor] = {}
    next_shard: dict[str, Tensor] = {}
    number = 1
    for count, name in enumerate(weights):
        if number < shards and written >= total * number / shards:
            yield shard
            shard, next_shard, number = next_shard, {}, number + 1
        data, scale = _tensors(name, specs[name], values)
        shard[name] = data
        if scale is not None:
            away = count % AWAY == 0 and number < shards
            (next_shard if away else shard)[name + SCALE_SUFFIX] = scale
        written += specs[name].bytes
    yield shard
    if number < shards:
        raise ValueError(f"{shards} files are too many for {len(weights)} weights")


def _tensors(name: str, spec: TensorSpec, values: Values) -> tuple[Tensor, Tensor | None]:
    """A tensor in the checkpoint's dtype, and its scales if it is quantised."""
    if spec.kind == Kind.MTP_COPY:
        name = "lm_head.weight" if "shared_head" in name else "model.embed_tokens.weight"
    value = values(name, spec)
    match spec.dtype:
        case "F8_E4M3":
            weight = quantise_blocks_ref(value)
            return weight.data, weight.scale_inv
        case "BF16":
            return value.to(torch.bfloat16), None
        case _:
            return value, None


def _values(name: str, spec: TensorSpec, seed: int) -> Tensor:
    """Normal values such that every matrix keeps the scale of what it is given, as float32."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest()
    generator = np.random.default_rng(int.from_bytes(digest, "little"))
    values = torch.from_numpy(generator.standard_normal(spec.shape, dtype=np.float32))
    if spec.kind == Kind.NORM:
        return 1.0 + 0.1 * values
    if name.endswith("e_score_correction_bias"):
        return BIAS_STD * values
    if spec.kind == Kind.EMBEDDING or name == "model.embed_tokens.weight":
        return values
    gain = LOGIT_STD if name == "lm_head.weight" else 1.0
    return values * (gain / math.sqrt(spec.shape[-1]))


def _json(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"


def _write(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text, "utf-8")
