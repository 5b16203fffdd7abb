"""Router, the way to the experts and back, and sampling, in the interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rayseek.kernels.experts import combine_ref
from rayseek.kernels.hopper import permute, router, sample
from rayseek.kernels.router import route_ref
from rayseek.kernels.sample import Draw
from rayseek.kernels.sample import sample as sample_ref


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(
    seed=st.integers(0, 10_000),
    shape=st.sampled_from([(8, 4, 32, 8), (4, 2, 8, 4), (1, 1, 16, 2), (4, 4, 2, 8), (4, 1, 3, 2),
                           (3, 3, 1, 2)]),
    ties=st.booleans(),
    normalise=st.booleans(),
)  # fmt: skip
@settings(max_examples=12)
def test_router_is_the_reference(
    seed: int, shape: tuple[int, int, int, int], ties: bool, normalise: bool
) -> None:
    groups, keep, size, top_k = shape
    logits, bias = random(4, groups * size, seed=seed), random(groups * size, seed=seed + 1)
    if ties:
        logits, bias = logits.round(), (bias * 2).round() / 2
    if size == 1:  # the reference sums the best one only where a group has no second
        bias = bias.abs()
    ids, weights = router.route(logits, bias, groups, keep, top_k, normalise, 2.5)
    same_ids, same_weights = route_ref(logits, bias, groups, keep, top_k, normalise, 2.5)
    assert torch.equal(ids, same_ids)
    torch.testing.assert_close(weights, same_weights)


def test_router_chooses_k_experts_whatever_the_logits() -> None:
    logits = random(3, 32)
    logits[0], logits[1, 5] = torch.nan, torch.inf
    ids, _ = router.route(logits, torch.zeros(32), 4, 2, 4, True, 1.0)
    assert bool((ids.diff(dim=1) > 0).all()) and int(ids.min()) >= 0 and int(ids.max()) < 32


@given(seed=st.integers(0, 999), rows=st.integers(1, 40), experts=st.sampled_from([1, 3, 8, 40]))
@settings(max_examples=8)
def test_assignment_sorts_by_expert_and_cuts_tiles(seed: int, rows: int, experts: int) -> None:
    top_k = min(experts, 4)
    make = torch.Generator().manual_seed(seed)
    chosen = torch.stack([torch.randperm(experts, generator=make)[:top_k] for _ in range(rows)])
    ids = chosen.sort(dim=1).values.int()
    pairs = ids.flatten()
    to = permute.assign(pairs, experts, top_k)
    order = sorted(range(rows * top_k), key=lambda pair: (int(pairs[pair]), pair))
    assert to.pair_S.tolist() == order and to.used.tolist() == [len(order)]
    assert to.row_S.tolist() == [pair // top_k for pair in order]
    covered = []
    for expert, first, stop in zip(*(column.tolist() for column in to.tiles[:3]), strict=True):
        if expert >= 0:
            assert 0 < stop - first <= to.tiles.rows
            assert {int(pairs[order[s]]) for s in range(first, stop)} == {expert}
            covered += range(first, stop)
    assert covered == list(range(rows * top_k))


def test_pairs_without_an_expert_here_are_left_out() -> None:
    pairs = torch.tensor([3, -1, 0, 3, 9, 0], dtype=torch.int32)
    rows = torch.tensor([5, 5, 1, 0, 2, 4], dtype=torch.int32)
    to = permute.assign(pairs, 4, rows)
    assert to.used.tolist() == [4]
    assert to.pair_S[:4].tolist() == [2, 5, 0, 3] and to.row_S[:4].tolist() == [1, 4, 5, 0]
    data, scale = (random(6, 300) * 50).to(torch.float8_e4m3fn), random(3, 6, seed=1).abs()
    moved, scales = permute.gather(data, scale, to)
    assert torch.equal(moved[:4].float(), data[[1, 4, 5, 0]].float())
    assert torch.equal(scales[:, :4], scale[:, [1, 4, 5, 0]])


@pytest.mark.parametrize("indexed", [False, True])
def test_products_come_back_weighted_in_order(indexed: bool) -> None:
    y, weights, into = random(9, 1100).bfloat16(), random(3, 3, seed=2), random(3, 1100, seed=3)
    index = torch.tensor([8, 0, 3, 3, 5, 1, 2, 7, 6]) if indexed else torch.arange(9)
    expected = into.clone()
    combine_ref(y.float(), index.view(3, 3), weights, expected)
    permute.combine(y, weights, into, index.view(3, 3).int() if indexed else None)
    assert torch.equal(into, expected)


@given(
    seed=st.integers(0, 2**63),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 2, 40, 5000]),
    top_p=st.sampled_from([1.0, 0.9, 0.37, 1e-9]),
    min_p=st.sampled_from([0.0, 0.05]),
    coarse=st.booleans(),
)
@settings(max_examples=12)
def test_sampled_tokens_are_the_reference(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float, coarse: bool
) -> None:
    logits = random(3, 2500, seed=seed % 1000) * 3
    logits[:, 100:200] = -torch.inf
    if coarse:  # many ties, at the edges of the filters too
        logits = logits.round()
    draws = [
        Draw(temperature, top_k, top_p, min_p, seed, 7),
        Draw(0.0, 5, 0.5, 0.0, seed, 8),
        Draw(1.0, 0, 1.0, 0.0, seed, 9),
    ]
    assert sample.draw(logits, draws).tolist() == sample_ref(logits.clone(), draws)


def test_many_draws_agree_with_the_reference() -> None:
    logits = random(1, 3000, seed=5).expand(8, -1).contiguous() * 2
    draws = [Draw(0.8, 0, 0.6, 0.0, 3, position) for position in range(8)]
    assert sample.draw(logits, draws).tolist() == sample_ref(logits.clone(), draws)
