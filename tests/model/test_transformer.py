"""Our forward pass against transformers' DeepseekV3, and its forms against each other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rayseek.kernels.fp8 import dequantise_ref
from rayseek.kernels.ops import Ops
from rayseek.kernels.select import choose_ops
from rayseek.model.batch import Batch
from rayseek.model.checkpoint import Checkpoint
from rayseek.model.config import ModelConfig, Yarn
from rayseek.model.inventory import owned_names
from rayseek.model.latent_cache import LatentCache
from rayseek.model.maker import SMALL, make_checkpoint
from rayseek.model.mla import Form
from rayseek.model.mtp import MTPModule
from rayseek.model.transformer import Transformer

YARN = Yarn(40.0, 64, 32.0, 1.0, 1.0)  # 64 positions originally, so that a test goes beyond them
ODD = replace(
    SMALL, hidden_size=200, intermediate_size=136, moe_intermediate_size=56, num_hidden_layers=3,
    num_attention_heads=3, q_lora_rank=72, kv_lora_rank=88, qk_nope_head_dim=24,
    qk_rope_head_dim=12, v_head_dim=20, yarn=YARN, vocab_size=2056, max_position_embeddings=2560,
)  # fmt: skip
CONFIGS = {
    "small": SMALL,
    "odd sizes, yarn far beyond its origin": ODD,
    "three dense layers": replace(ODD, first_k_dense_replace=3, num_hidden_layers=5),
    "no q_lora": replace(ODD, q_lora_rank=None),
    "8 groups keep 3, top 6, two shared experts": replace(
        SMALL, n_routed_experts=32, n_group=8, topk_group=3, num_experts_per_tok=6,
        n_shared_experts=2, num_hidden_layers=3,
    ),
    "no yarn": replace(ODD, yarn=None, num_nextn_predict_layers=0),
    "one group, weights not normalised": replace(
        ODD, n_group=1, topk_group=1, norm_topk_prob=False, routed_scaling_factor=1.0
    ),
}  # fmt: skip
FP8 = {
    "small, block-FP8": SMALL,
    "odd sizes, block-FP8": replace(ODD, qk_nope_head_dim=40, num_attention_heads=5),
}
TOKENS = 150


@pytest.fixture(params=["reference", "native"])
def ops(request: pytest.FixtureRequest) -> Ops:
    try:
        return choose_ops("cpu", request.param).ops
    except RuntimeError as why:
        pytest.skip(str(why))


def random_ids(config: ModelConfig, count: int = TOKENS, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (count,), generator=generator).tolist()


def make(path: Path, config: ModelConfig, fp8: bool) -> Path:
    """A checkpoint whose selection biases are strongly negative, as trained ones can be."""
    make_checkpoint(path, config, seed=3, fp8=fp8, shards=3)
    for shard in path.glob("*.safetensors"):
        tensors = load_file(shard)
        for name in tensors:
            if name.endswith("e_score_correction_bias"):
                tensors[name] -= 0.6
        save_file(tensors, shard, {"format": "pt"})
    return path


def ours(path: Path, ops: Ops, form: Form = "absorbed") -> Transformer:
    config = ModelConfig.from_pretrained(path)
    weights = Checkpoint.open(path).load(owned_names(config), progress=False)
    return Transformer(config, weights, ops, 512, form)


@torch.inference_mode()
def run(model: Transformer, ids: list[int], chunks: list[int], pages: list[int]) -> Tensor:
    """Logits of every token, computed in chunks of the given sizes."""
    cache = LatentCache(model.config, max(pages) + 1, model.ops)
    for page in cache.layers:
        page.view(torch.float32).fill_(torch.nan)  # what a slot held before must never matter
    parts, start = [], 0
    for size in chunks:
        parts.append(
            model(Batch.of_sequences([ids[start : start + size]], [start], [pages]), cache)
        )
        start += size
    assert start == len(ids)
    return torch.cat(parts)


@torch.inference_mode()
def theirs(path: Path, ids: list[int]) -> Tensor:
    from transformers import DeepseekV3ForCausalLM

    model = DeepseekV3ForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    logits: Tensor = model.eval()(torch.tensor([ids])).logits[0]
    return logits


def dequantised_copy(path: Path, into: Path) -> Path:
    """The same weights as a float32 checkpoint, for an implementation without block-FP8."""
    checkpoint = Checkpoint.open(path)
    tensors = {
        name: dequantise_ref(checkpoint.weight(name)).contiguous()
        if entry.dtype == "F8_E4M3" else checkpoint.tensor(name).float().clone()
        for name, entry in checkpoint.stored.items()
        if not name.endswith("_scale_inv")
    }  # fmt: skip
    into.mkdir()
    save_file(tensors, into / "model.safetensors", {"format": "pt"})
    plain = replace(checkpoint.config, fp8_blocks=False).to_dict()
    (into / "config.json").write_text(json.dumps(plain))
    return into


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name: str, tmp_path: Path, ops: Ops) -> None:
    path = make(tmp_path / "m", CONFIGS[name], fp8=False)
    ids = random_ids(CONFIGS[name])
    expected = theirs(path, ids)
    got = run(ours(path, ops), ids, [TOKENS], [2, 0, 1])
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", FP8)
def test_block_fp8_equals_its_dequantised_weights(name: str, tmp_path: Path, ops: Ops) -> None:
    path = make(tmp_path / "m", FP8[name], fp8=True)
    ids = random_ids(FP8[name])
    expected = theirs(dequantised_copy(path, tmp_path / "f32"), ids)
    got = run(ours(path, ops), ids, [TOKENS], [2, 0, 1])
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", ["small", "odd sizes, yarn far beyond its origin", "no q_lora"])
def test_absorbed_naive_chunked_and_one_by_one_agree(name: str, tmp_path: Path, ops: Ops) -> None:
    path = make(tmp_path / "m", CONFIGS[name], fp8=False)
    ids = random_ids(CONFIGS[name])
    absorbed = ours(path, ops)
    whole = run(absorbed, ids, [TOKENS], [4, 1, 3])
    naive = run(ours(path, ops, "naive"), ids, [TOKENS], [0, 1, 2])
    chunked = run(absorbed, ids, [1, 62, 2, 64, 21], [5, 0, 2])
    single = run(absorbed, ids, [1] * TOKENS, [2, 1, 0])
    scale = whole.abs().max()
    for other in (naive, chunked, single):
        assert (other - whole).abs().max() <= 1e-5 * scale
    if ops.name == "native":  # its sums have one order, whatever else is in the call
        assert torch.equal(chunked, whole)
        assert torch.equal(single, whole)


@torch.inference_mode()
def test_rows_of_a_batch_do_not_see_each_other(tmp_path: Path, ops: Ops) -> None:
    model = ours(make(tmp_path / "m", ODD, fp8=False), ops)
    prompts = [random_ids(ODD, n, seed=n) for n in (1, 63, 64, 65, 130)]
    pages = [[0], [1], [2], [3, 4], [7, 5, 6]]
    cache = LatentCache(model.config, 8, ops)
    together = model(Batch.of_sequences(prompts, [0] * 5, pages), cache)
    alone = torch.cat([run(model, ids, [len(ids)], [0, 1, 2]) for ids in prompts])
    assert (together - alone).abs().max() <= 1e-5 * alone.abs().max()
    if ops.name == "native":
        assert torch.equal(together, alone)


@torch.inference_mode()
def test_mtp_module_follows_its_definition(tmp_path: Path, ops: Ops) -> None:
    """Against spec 2.2 written out with torch's own norm and matmul around the decoder layer."""
    path = make(tmp_path / "m", SMALL, fp8=False)
    model = ours(path, ops)
    config, layer = model.config, SMALL.num_hidden_layers
    weights = Checkpoint.open(path).load(owned_names(config), progress=False)
    mtp = MTPModule(config, weights, ops, model)
    ids = random_ids(config, 70)
    batch = Batch.of_sequences([ids[1:]], [0], [[1, 0]])
    hidden = ops.rms_norm(
        model.hidden(
            Batch.of_sequences([ids[:-1]], [0], [[0, 1]]), LatentCache(config, 2, ops).layers
        ),
        model.final_norm,
    )
    logits, normed = mtp(
        batch, hidden, ops.new_pages(2, config.kv_lora_rank, config.qk_rope_head_dim)
    )

    def norm(x: Tensor, name: str) -> Tensor:
        w = weights.tensor(f"model.layers.{layer}.{name}.weight").float()
        return torch.nn.functional.rms_norm(x, w.shape, w, config.rms_norm_eps)

    embedded = weights.tensor("model.embed_tokens.weight")[ids[1:]].float()
    eh = weights.tensor(f"model.layers.{layer}.eh_proj.weight").float()
    x = torch.cat([norm(embedded, "enorm"), norm(hidden, "hnorm")], dim=1) @ eh.T
    pages = ops.new_pages(2, config.kv_lora_rank, config.qk_rope_head_dim)
    y = mtp.block.feed_forward(mtp.block.attend(x, batch, pages, model.cos_sin_PR))
    expected = norm(y, "shared_head.norm")
    assert torch.allclose(normed, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    head = weights.tensor("lm_head.weight").float()
    assert torch.allclose(logits, expected @ head.T, rtol=1e-3, atol=1e-3)
