"""The laws of the engine and of transfers hold with FP8 latents as they do without."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from rayseek.cluster.build import build_engine
from rayseek.cluster.config import EngineSettings
from rayseek.cluster.engine import Engine
from rayseek.cluster.request import Request
from tests.cluster.test_engine import (
    alone,
    prompt_of,
    sampling,
    test_preemption_happens_and_changes_nothing,
    test_same_tokens_after_a_restart_in_the_middle,
    test_same_tokens_whatever_the_batch_the_chunks_the_cache_the_drafts_and_preemption,
)
from tests.cluster.test_transfer import (
    Split,
    split,
    test_copied_pages_give_the_same_tokens,
    test_split_prefill_gives_the_same_tokens,
)

__all__ = [  # collected once more here, with the fixture below
    "Split",
    "split",
    "test_copied_pages_give_the_same_tokens",
    "test_preemption_happens_and_changes_nothing",
    "test_same_tokens_after_a_restart_in_the_middle",
    "test_same_tokens_whatever_the_batch_the_chunks_the_cache_the_drafts_and_preemption",
    "test_split_prefill_gives_the_same_tokens",
]

EngineMaker = Callable[..., Engine]


@pytest.fixture
def make_engine(make_engine: EngineMaker) -> EngineMaker:
    return partial(make_engine, kv_dtype="fp8")


def test_the_setting_makes_such_an_engine(tiny_path: Path, make_engine: EngineMaker) -> None:
    """The tokens of the engines above, a fingerprint of its own, and more pages for the bytes."""
    settings = EngineSettings(cache_gib=0.01, max_context=256, draft_tokens=0)
    plain, fp8 = (
        build_engine(tiny_path, settings.model_copy(update={"kv_dtype": kv}))
        for kv in ("auto", "fp8")
    )
    assert plain.fingerprint != fp8.fingerprint
    page = fp8.model.cache.page_words * 4
    assert page == 2 * 64 * 96  # 64 e4m3, a scale, 8 bf16, filled up to 16 bytes; two layers
    assert fp8.model.cache.num_pages == int(0.01 * 2**30 / page)
    request = Request("r", prompt_of(1, 100), sampling(max_tokens=40, logprobs=0))
    expected = alone(make_engine, request)
    assert alone(lambda: fp8, request) == expected
    assert alone(lambda: plain, request) != expected  # if only in the log-probabilities
