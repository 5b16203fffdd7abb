"""Sampling: noise as a pure function, filters against a plain NumPy statement of the rules."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayseek.kernels.sample import Draw, gumbel_noise, keep_mask, noise_key, sample, top_logprobs

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


def test_draws_follow_the_distribution() -> None:
    """Chi-square of 20,000 draws against softmax(logits / T)."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf, 0.5])
    n, temperature = 20_000, 0.7
    rows = logits.repeat(n, 1)
    drawn = sample(rows, [Draw(temperature, 0, 1.0, 0.0, 3, position) for position in range(n)])
    expected = n * torch.softmax(logits / temperature, 0).double()
    seen = torch.bincount(torch.tensor(drawn), minlength=6).double()
    assert seen[4] == 0
    live = expected > 0
    chi2 = float(((seen - expected)[live] ** 2 / expected[live]).sum())
    assert chi2 < 18.5  # 4 degrees of freedom, p = 0.001


def test_greedy_takes_the_lowest_id_of_a_tie() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0]])
    assert sample(logits, [Draw(0.0, 0, 1.0, 0.0, 0, 0)]) == [1]


@settings(deadline=None)
@given(
    st.lists(st.integers(-40, 40), min_size=2, max_size=12),
    st.integers(0, 12),
    st.floats(0.05, 1.0),
    st.floats(0.0, 1.0),
)
def test_filters_equal_their_definition(
    tenths: list[int], top_k: int, top_p: float, min_p: float
) -> None:
    """Walk down the ids from the most likely and apply each rule as its definition says."""
    logits = np.array(tenths, dtype=np.float64) / 10
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    kept = order[:top_k] if top_k else order
    weights = np.exp(logits[kept] - logits.max())
    probs = weights / weights.sum()
    before = np.concatenate([[0.0], np.cumsum(probs)[:-1]])
    close = np.minimum(np.abs(before - top_p), np.abs(probs - min_p * probs[0]))
    if (close < 1e-6).any():
        return  # a rounding error away from either answer
    expected = {
        i
        for rank, i in enumerate(kept)
        if rank == 0 or ((top_p >= 1.0 or before[rank] < top_p) and probs[rank] >= min_p * probs[0])
    }
    got = keep_mask(torch.tensor(logits, dtype=torch.float32), top_k, top_p, min_p)
    assert set(got.nonzero().flatten().tolist()) == expected


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
