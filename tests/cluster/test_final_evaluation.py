"""What a checkpoint is worth is measured with the kernels that would serve it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayseek.cluster import engine
from rayseek.cluster.final_evaluation import ANSWER_TOKENS, measure_drafts
from rayseek.kernels.sampler import NativeSampler
from rayseek.kernels.select import choose_ops

PROMPTS = [[5, 6, 7], list(range(40, 90))]


def test_answers_are_drawn_as_they_are_served(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = choose_ops()
    if not isinstance(kernels.sampler, NativeSampler):
        pytest.skip(kernels.reason)

    def unused() -> None:
        raise AssertionError("PyTorch draws, where the server would not")

    monkeypatch.setattr(engine, "TorchSampler", unused)
    found = measure_drafts(tiny_path, PROMPTS, kernels, "cpu")
    assert 0 < found.drafted <= found.written <= 2 * ANSWER_TOKENS
