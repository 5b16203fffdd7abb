"""Sampling: noise as a pure function, filters against a plain NumPy statement of the rules."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rayseek.cluster.next_token import edits
from rayseek.cluster.request import Request, SamplingParams
from rayseek.cluster.sequence import Sequence
from rayseek.kernels.sample import Draw, gumbel_noise, keep_mask, noise_key, sample, top_logprobs
from rayseek.kernels.sampler import apply_edit

VOCAB = 257


def test_noise_depends_on_seed_position_and_id_alone() -> None:
    keys = [noise_key(seed, position) for seed in (0, 1, 2**64 - 1) for position in (0, 1, 4095)]
    together = gumbel_noise(keys, VOCAB)
    for row, key in zip(together, keys, strict=True):
        assert torch.equal(row, gumbel_noise([key], VOCAB)[0])
        assert torch.equal(row[:100], gumbel_noise([key], 100)[0])
    assert len({tuple(row.tolist()) for row in together}) == len(keys)


def test_noise_is_standard_gumbel() -> None:
    noise = gumbel_noise([noise_key(7, p) for p in range(200)], 5000).double()
    assert abs(float(noise.mean()) - 0.5772) < 0.005
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.01
    assert torch.isfinite(noise).all()


def plain_filter(logits: Any, top_k: int, top_p: float, min_p: float) -> set[int]:
    """Walk down the ids from the most likely and apply each rule as its definition says."""
    logits = np.asarray(logits, dtype=np.float64)
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    kept = order[:top_k] if top_k else order
    weights = np.exp(logits[kept] - logits.max())
    probs = weights / weights.sum()
    before = np.concatenate([[0.0], np.cumsum(probs)[:-1]])
    return {
        i
        for rank, i in enumerate(kept)
        if rank == 0 or ((top_p >= 1.0 or before[rank] < top_p) and probs[rank] >= min_p * probs[0])
    }


def fixed_distributions() -> list[tuple[list[float], Draw]]:
    """Logits and how to draw from them: flat, steep, masked, of many ids, filtered."""
    rng = np.random.default_rng(20)
    found = []
    for number in range(20):
        size = [3, 6, 12, 40][number % 4]
        logits = rng.normal(scale=[0.3, 1.0, 2.5][number % 3], size=size)
        if number % 5 == 1:
            logits[rng.integers(size)] = -np.inf
        filters = [(0, 1.0, 0.0), (3, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.15), (5, 0.9, 0.05)]
        draw = Draw([0.3, 0.7, 1.0, 1.6][number // 5], *filters[number % 5], number, 0)
        found.append((logits.tolist(), draw))
    return found


@pytest.mark.parametrize("number", range(20))
def test_draws_follow_the_distribution(number: int) -> None:
    """Chi-square of 100,000 draws against the softmax of what the filters leave."""
    logits, draw = fixed_distributions()[number]
    n = 100_000
    scaled = np.float32(logits) / np.float32(draw.temperature)
    kept = sorted(plain_filter(scaled, draw.top_k, draw.top_p, draw.min_p))
    weights = np.exp(scaled[kept].astype(np.float64) - scaled.max())
    filtered = [draw._replace(position=position) for position in range(500)]
    drawn = sample(torch.tensor(logits).repeat(n, 1)[:500], filtered)
    left = torch.full((len(logits),), -torch.inf)  # filtering once makes 100,000 draws fast
    left[kept] = torch.tensor(logits)[kept]
    draws = [Draw(draw.temperature, 0, 1.0, 0.0, draw.seed, position) for position in range(n)]
    assert drawn == (drawn := sample(left.repeat(n, 1), draws))[:500]
    seen = np.bincount(drawn, minlength=len(logits))
    assert seen.sum() == seen[kept].sum(), "an id that was filtered out"
    expected = n * weights / weights.sum()
    pooled = expected < 5  # too rare for the approximation: one class
    seen_classes = [*seen[kept][~pooled], seen[kept][pooled].sum()]
    expected_classes = [*expected[~pooled], expected[pooled].sum()]
    chi2 = sum((s - e) ** 2 / e for s, e in zip(seen_classes, expected_classes, strict=True) if e)
    freedom = max(1, sum(e > 0 for e in expected_classes) - 1)
    limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi2 < limit  # p = 0.0001 (Wilson and Hilferty); the seeds are fixed


def test_greedy_takes_the_lowest_id_of_a_tie() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0]])
    assert sample(logits, [Draw(0.0, 0, 1.0, 0.0, 0, 0)]) == [1]


@given(
    st.lists(st.integers(-40, 40), min_size=2, max_size=12),
    st.integers(0, 12),
    st.floats(0.05, 1.0),
    st.floats(0.0, 1.0),
)
def test_filters_equal_their_definition(
    tenths: list[int], top_k: int, top_p: float, min_p: float
) -> None:
    logits = np.array(tenths, dtype=np.float64) / 10
    kept = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: top_k or None]
    probs = np.exp(logits[kept] - logits.max())
    probs /= probs.sum()
    before = np.concatenate([[0.0], np.cumsum(probs)[:-1]])
    close = np.minimum(np.abs(before - top_p), np.abs(probs - min_p * probs[0]))
    if (close < 1e-6).any():
        return  # a rounding error away from either answer
    got = keep_mask(torch.tensor(logits, dtype=torch.float32), top_k, top_p, min_p)
    assert set(got.nonzero().flatten().tolist()) == plain_filter(logits, top_k, top_p, min_p)


IDS = st.lists(st.integers(0, 15), max_size=8)
PENALTY = st.sampled_from([0.0, 0.5, -0.7, 2.0])


@given(IDS, IDS, PENALTY, PENALTY, st.sampled_from([1.0, 1.3, 0.7]), st.integers(0, 9), st.data())
def test_penalties_and_bias_equal_their_definition(
    prompt: list[int],
    emitted: list[int],
    frequency: float,
    presence: float,
    repetition: float,
    min_tokens: int,
    data: st.DataObject,
) -> None:
    """Spec 6.1 id by id in float32, exactly: repetition, the other two, bias, early stops."""
    bias = data.draw(st.dictionaries(st.integers(0, 15), st.sampled_from([-3.0, 0.25, 100.0])))
    params = SamplingParams(
        99, frequency_penalty=frequency, presence_penalty=presence, repetition_penalty=repetition,
        logit_bias=tuple(bias.items()), min_tokens=min_tokens, stop_token_ids=(1, 9),
    )  # fmt: skip
    values = data.draw(st.lists(st.floats(-20, 20, width=32), min_size=16, max_size=16))
    expected = np.array(values, dtype=np.float32)
    for i in range(16):
        if i in prompt or i in emitted:
            factor = np.float32(repetition)
            expected[i] = expected[i] / factor if expected[i] > 0 else expected[i] * factor
        if i in emitted:
            count = np.float32(emitted.count(i))
            expected[i] -= count * np.float32(frequency) + np.float32(presence)
        expected[i] += np.float32(bias.get(i, 0.0))
        if len(emitted) < min_tokens and i in (1, 9):
            expected[i] = -np.inf
    request = Request("r", tuple(prompt), params, emitted_ids=tuple(emitted))
    logits = torch.tensor(values)
    for edit in edits(Sequence.start(request, 0).place):
        apply_edit(logits, edit)
    assert np.array_equal(logits.numpy(), expected)


class Unread(list[int]):
    """A context that nobody may go through."""

    def __iter__(self) -> Any:
        raise AssertionError("a token must not cost more the longer the context")


def test_penalties_go_through_no_context() -> None:
    params = SamplingParams(99, frequency_penalty=0.5, repetition_penalty=1.3)
    request = Request("r", tuple(range(3, 60)), params)
    sequence = Sequence.start(request, 0)
    sequence.ids = Unread(sequence.ids)
    emitted = tuple(4 * i % 101 for i in range(150))
    for token in emitted:
        sequence.append(token)
    changed = Sequence.start(replace(request, emitted_ids=emitted), 0)
    for one, other in zip(edits(sequence.place), edits(changed.place), strict=True):
        logits = torch.linspace(-2, 2, VOCAB), torch.linspace(-2, 2, VOCAB)
        apply_edit(logits[0], one)
        apply_edit(logits[1], other)
        assert torch.equal(*logits)


def test_rows_do_not_depend_on_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, VOCAB, generator=generator) * 3
    draws = [
        Draw(t, k, p, m, seed, seed * 3)
        for seed, (t, k, p, m) in enumerate(
            [(0.0, 0, 1.0, 0.0), (0.3, 0, 1.0, 0.0), (1.3, 5, 1.0, 0.0), (1.0, 0, 0.8, 0.1)] * 10
        )
    ]
    together = sample(logits.clone(), draws)
    alone = [sample(logits[r : r + 1].clone(), [draws[r]])[0] for r in range(40)]
    assert together == alone


def test_logprobs_are_of_the_given_row() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0])
    value, top = top_logprobs(logits, 0, 2)
    expected = torch.log_softmax(logits, 0).tolist()
    assert math.isclose(value, expected[0], rel_tol=1e-6)
    assert [i for i, _ in top] == [2, 1]
    assert math.isclose(top[0][1], expected[2], rel_tol=1e-6)
