"""A pass as one call of C++ has the bits of the single operations, wherever it is used."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rayseek.cluster.expert_tally import ExpertTally
from rayseek.kernels.native import NativeOps
from rayseek.kernels.native_build import NativeUnavailableError
from rayseek.model.batch import Batch
from rayseek.model.cached_model import CachedModel, Passed
from rayseek.model.checkpoint import Checkpoint
from rayseek.model.config import ModelConfig, Yarn
from rayseek.model.inventory import owned_names
from rayseek.model.maker import SMALL, make_checkpoint
from rayseek.model.moe import LocalExperts
from rayseek.model.mtp import MTPModule
from rayseek.model.transformer import Transformer

ODD = replace(
    SMALL, hidden_size=72, intermediate_size=136, moe_intermediate_size=40, num_hidden_layers=3,
    num_attention_heads=3, q_lora_rank=40, kv_lora_rank=56, qk_nope_head_dim=24,
    qk_rope_head_dim=12, v_head_dim=20, yarn=Yarn(8.0, 64, 32.0, 1.0, 1.0),
    num_nextn_predict_layers=1, max_position_embeddings=512,
)  # fmt: skip
CONFIGS = {
    "odd sizes, block-FP8": replace(ODD, fp8_blocks=True),
    "no q_lora, bf16": replace(ODD, q_lora_rank=None, fp8_blocks=False),
    "two dense layers, top 3, not normalised": replace(
        ODD, first_k_dense_replace=2, num_experts_per_tok=3, norm_topk_prob=False
    ),
    "queries much wider than what they are made of": replace(
        ODD, num_attention_heads=12, q_lora_rank=8
    ),
}
SHAPES = [  # rows of each sequence, and of how many logits are wanted
    ((1,), (1,)),
    ((2,), (1,)),
    ((1, 3, 2), (1, 1, 1)),
    ((1, 1, 1), (1, 1, 1)),
    ((9, 20, 30), (3, 0, 1)),
    ((4, 5, 6), (0, 0, 0)),
    ((130, 19, 13), (1, 19, 0)),  # more than are multiplied together
    ((60, 60, 52), (59, 60, 52)),
]


@pytest.fixture(params=["amx", "vector"])
def ops(request: pytest.FixtureRequest) -> NativeOps:
    try:
        native = NativeOps()
    except NativeUnavailableError as error:
        pytest.skip(str(error))
    if request.param == "amx" and not native.amx:
        pytest.skip("this CPU has no AMX")
    request.addfinalizer(lambda: native.library.rs_set_amx(native.amx))
    native.library.rs_set_amx(request.param == "amx")
    return native


@pytest.fixture(scope="module", params=CONFIGS)
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "model"
    make_checkpoint(path, CONFIGS[request.param], seed=3)
    return path


def bits(model: CachedModel) -> list[torch.Tensor]:
    return [pages.clone() for pages in model.cache.layers]


@torch.inference_mode()
def test_a_whole_pass_has_the_bits_of_its_operations(ops: NativeOps, stored: Path) -> None:
    config = ModelConfig.from_pretrained(stored)
    weights = Checkpoint.open(stored).load(owned_names(config), progress=False)
    tallies = [ExpertTally(), ExpertTally()]
    models = []
    for tally in tallies:
        counted = tally.counted(config, lambda p: LocalExperts(config, weights, p, ops))
        main = Transformer(config, weights, ops, 256, experts=counted)
        models.append(CachedModel(main, 16, MTPModule(config, weights, ops, main, counted)))
    whole, single = models
    assert whole._whole is not None and whole._whole_draft is not None
    single._whole = single._whole_draft = None
    generator = torch.Generator().manual_seed(1)
    tables = [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    for start, (counts, outs) in zip(range(0, 80, 10), SHAPES, strict=True):
        ids = [torch.randint(3, 300, (n,), generator=generator).tolist() for n in counts]
        batch = Batch.of_sequences(ids, [start] * len(ids), tables[: len(ids)], outs)
        one, other = whole.forward(batch), single.forward(batch)
        same(one, other)
        assert one.normed_TD is not None and len(one.normed_TD) == sum(counts)
        drafts = whole.draft(batch, one.normed_TD)
        same(drafts, single.draft(batch, one.normed_TD))
        assert drafts.normed_TD is not None and len(drafts.normed_TD) == sum(outs)
        assert all(map(torch.equal, bits(whole), bits(single)))
    rows, expected = (tally.take() for tally in tallies)
    assert rows is not None and expected is not None
    assert (rows.rows == expected.rows).all() and rows.rows.sum() > 0


def same(one: Passed, other: Passed) -> None:
    assert torch.equal(one.logits_RV, other.logits_RV)
    assert one.normed_TD is not None and other.normed_TD is not None
    assert torch.equal(one.normed_TD, other.normed_TD)
