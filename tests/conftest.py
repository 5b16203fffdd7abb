"""Shared by all rooms: a tiny random model, made once a session, and engines over it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from rayseek.cluster.engine import Engine, EngineLimits
from rayseek.cluster.grammar import GrammarCompiler, grammar_vocabulary
from rayseek.cluster.scheduler import Limits
from rayseek.cluster.speculation import DepthPolicy, choose_depth
from rayseek.kernels.kv_format import KVDtype
from rayseek.kernels.select import choose_ops
from rayseek.model.batch import PAGE_TOKENS, Batch
from rayseek.model.cached_model import CachedModel, Passed
from rayseek.model.checkpoint import Checkpoint
from rayseek.model.inventory import owned_names
from rayseek.model.maker import SMALL, make_checkpoint
from rayseek.model.mtp import MTPModule
from rayseek.model.transformer import Transformer
from rayseek.model.vocabulary import undefined_ids

# For tests/kernels/hopper: Triton reads it when it is imported, which torch.compile does as well.
os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)
# Of a busy machine nothing can be said by how long an example takes; fixtures are only read.
settings.register_profile(
    "usual",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("usual")
settings.register_profile("long", max_examples=2000)  # pytest --hypothesis-profile long


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="random requests as many as are promised, not a few"
    )
    parser.addoption("--seed", type=int, default=0, help="of the random requests of whole units")


TINY = replace(
    SMALL, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=2, q_lora_rank=32, kv_lora_rank=64, qk_nope_head_dim=16,
    qk_rope_head_dim=8, v_head_dim=16, n_routed_experts=8, num_experts_per_tok=2,
    num_nextn_predict_layers=1, fp8_blocks=False,
)  # fmt: skip


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Ranks and leaders set up the logs of their process, which here is the tests'."""
    logger = logging.getLogger("rayseek")
    handlers, level = list(logger.handlers), logger.level
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint in the official layout, with its tokenizer."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    make_checkpoint(path, TINY, seed=0, shards=2)
    return path


@pytest.fixture(scope="session")
def tiny_model(tiny_path: Path) -> tuple[Transformer, MTPModule]:
    return load_tiny(tiny_path, "auto")


@pytest.fixture(scope="session")
def tiny_fp8_model(tiny_path: Path) -> tuple[Transformer, MTPModule]:
    """The same weights; its pages are FP8 ones."""
    return load_tiny(tiny_path, "fp8")


def load_tiny(path: Path, kv_dtype: KVDtype) -> tuple[Transformer, MTPModule]:
    weights = Checkpoint.open(path).load(owned_names(TINY), progress=False)
    ops = choose_ops(kv_dtype=kv_dtype).ops
    main = Transformer(TINY, weights, ops, TINY.max_position_embeddings)
    return main, MTPModule(TINY, weights, ops, main)


class ForesightModel(CachedModel):
    """Drafts with the main model itself instead of the module, of which `blur` are wrong.

    Where the drafted token's own page is not held yet, the draft is any token.
    """

    def __init__(self, main: Transformer, pages: int, mtp: MTPModule, blur: float) -> None:
        super().__init__(main, pages, mtp)
        self.blur = blur
        self.blurred = 0

    def drafts_ahead(self, *_: object) -> None:
        """One by one, by foresight."""

    def draft(self, batch: Batch, hidden_TD: Tensor) -> Passed:
        super().draft(batch, hidden_TD)
        out_R = batch.out_rows_R
        positions = batch.positions_T[out_R].long() + 1
        page = batch.page_table_BP[
            batch.sequence_T[out_R].long(),
            (positions // PAGE_TOKENS).clamp(max=batch.page_table_BP.shape[1] - 1),
        ]
        ahead = Batch(
            batch.ids_T[out_R], positions.int(), page * PAGE_TOKENS + positions % PAGE_TOKENS,
            batch.sequence_T[out_R], batch.page_table_BP, torch.arange(len(out_R)),
        )  # fmt: skip
        ok = (positions % PAGE_TOKENS != 0).tolist()
        logits = super().forward(ahead).logits_RV if all(ok) else torch.zeros(len(ok), 2048)
        for r, position in enumerate(positions.tolist()):
            if not ok[r] or position * 7919 % 100 < 100 * self.blur:
                self.blurred += 1
                logits[r] = 0.0
        return Passed(logits, hidden_TD[out_R])


STEP = Limits(max_batch=16, step_tokens=256, chunk_tokens=64)
EngineMaker = Callable[..., Engine]


@pytest.fixture(scope="session")
def make_engine(
    tiny_model: tuple[Transformer, MTPModule],
    tiny_fp8_model: tuple[Transformer, MTPModule],
    tiny_path: Path,
) -> EngineMaker:
    """Engines over one set of weights, each with a page pool of its own.

    draft_tokens: 0 is without speculation. blur: draft by foresight (ForesightModel).
    """
    undefined = undefined_ids(tiny_path, TINY.vocab_size)
    vocabulary = grammar_vocabulary(tiny_path, TINY.vocab_size, TINY.eos_token_id)

    def make(
        pages: int = 64,
        context: int = 1024,
        max_queue: int = 1000,
        step: Limits = STEP,
        draft_tokens: int = 0,
        policy: DepthPolicy = choose_depth,
        blur: float | None = None,
        kv_dtype: KVDtype = "auto",
    ) -> Engine:
        limits = EngineLimits(pages, context, max_queue, step, draft_tokens)
        main, mtp = tiny_fp8_model if kv_dtype == "fp8" else tiny_model
        if blur is None:
            model = CachedModel(main, pages, mtp if draft_tokens else None)
        else:
            model = ForesightModel(main, pages, mtp, blur)
        grammars, sampler = GrammarCompiler(vocabulary), choose_ops().sampler
        return Engine(model, limits, undefined, grammars, policy, sampler=sampler)

    return make
