"""The C++ sampler: what PyTorch draws, and the same bits in any company."""

from __future__ import annotations

import platform

import numpy as np
import pytest
import torch

from rayseek.kernels.native import NativeOps
from rayseek.kernels.native_build import NativeUnavailableError
from rayseek.kernels.sample import Draw
from rayseek.kernels.sampler import Edit, NativeSampler, Row, TorchSampler


@pytest.fixture(params=["native", "x86-64"])
def native(request: pytest.FixtureRequest) -> NativeSampler:
    if request.param == "x86-64" and platform.machine() != "x86_64":
        pytest.skip("builds for x86-64")
    try:
        return NativeSampler(NativeOps(target=request.param).library)
    except NativeUnavailableError as error:
        pytest.skip(str(error))


def rows_of(rng: np.random.Generator, count: int, vocab: int) -> list[Row]:
    """Draws with every filter, bans, edits and masks; a few bans leave nothing."""
    rows = []
    for _ in range(count):
        draw = Draw(
            float(rng.choice([0.0, 0.3, 1.0, 1.6])), int(rng.choice([0, 0, 1, 5, 999])),
            float(rng.choice([1.0, 1.0, 0.9, 0.4])), float(rng.choice([0.0, 0.0, 0.05])),
            int(rng.integers(2**64, dtype=np.uint64)), int(rng.integers(4096)),
        )  # fmt: skip
        banned = torch.zeros(vocab).masked_fill_(torch.from_numpy(rng.random(vocab) < 0.2), -np.inf)
        edits: tuple[Edit, ...] = ()
        if rng.random() < 0.4:
            ids = torch.from_numpy(rng.permutation(vocab)[:5])
            shifts = torch.from_numpy(rng.normal(size=len(ids)).astype(np.float32))
            edits = (Edit(ids, torch.full_like(shifts, 1.3), penalty=True), Edit(ids, shifts))
        allowed = (rng.random(vocab) < 0.5).astype(np.uint8) if rng.random() < 0.4 else None
        logprobs = [None, 0, 3][rng.integers(3)]
        rows.append(Row(draw, banned, edits, allowed, logprobs))
    return rows


@pytest.mark.parametrize("vocab", [3, 16, 257, 2048])
def test_draws_are_those_of_pytorch(native: NativeSampler, vocab: int) -> None:
    """Seeds are fixed: were two ids ever within rounding of each other, they would be here too."""
    rng = np.random.default_rng(vocab)
    rows = rows_of(rng, 300, vocab)
    logits = torch.from_numpy(rng.normal(size=(300, vocab)).astype(np.float32))
    logits *= torch.from_numpy(rng.choice([0.3, 1.0, 4.0, 20.0], 300).astype(np.float32))[:, None]
    logits[7, vocab // 2] = torch.nan
    logits[8, vocab - 1] = torch.inf
    logits[9, 0] = -torch.inf
    got, expected = native.draw(logits, rows), TorchSampler().draw(logits.clone(), rows)
    assert [x.id for x in got] == [x.id for x in expected]
    assert [x.id for x in got[7:10]] == [None] * 3
    for mine, theirs in zip(got, expected, strict=True):
        assert [i for i, _ in mine.top] == [i for i, _ in theirs.top]
        assert (mine.logprob is None) == (theirs.logprob is None)
        if mine.logprob is not None:
            values = [mine.logprob, *(x for _, x in mine.top)]
            assert np.allclose(values, [theirs.logprob, *(x for _, x in theirs.top)], atol=1e-5)


def test_a_row_is_the_same_in_any_company(native: NativeSampler) -> None:
    rng = np.random.default_rng(5)
    rows = rows_of(rng, 40, 9001)  # enough for several threads
    logits = torch.from_numpy(rng.normal(size=(40, 9001)).astype(np.float32) * 3)
    before = logits.clone()
    native._library.rs_set_threads(3)
    together = native.draw(logits, rows)
    native._library.rs_set_threads(1)
    assert torch.equal(logits, before)
    for r, row in enumerate(rows):
        wide = torch.full((1, 9005), 50.0)
        wide[0, 2:9003] = logits[r]
        assert native.draw(wide[:, 2:9003], [row]) == [together[r]]


def test_ties_go_to_the_lowest_id_and_an_empty_choice_to_a_forbidden_one(
    native: NativeSampler,
) -> None:
    logits = torch.zeros(2, 40)
    logits[0, [37, 21]] = 3.0
    banned = torch.full((40,), -torch.inf)
    rows = [Row(Draw(0.0, 0, 1.0, 0.0, 0, 0), torch.zeros(40)),
            Row(Draw(1.0, 4, 0.5, 0.0, 1, 1), banned)]  # fmt: skip
    assert [x.id for x in native.draw(logits, rows)] == [21, 0]


@pytest.mark.parametrize("filtered", [False, True])
def test_draws_follow_the_distribution(native: NativeSampler, filtered: bool) -> None:
    """Chi-square of 50,000 draws; p = 0.0001 for 9 degrees of freedom, the seeds are fixed."""
    logits = torch.linspace(-1.0, 1.5, 10)
    mask, n = torch.zeros(10), 50_000
    filters = (10, 1.0, 0.001) if filtered else (0, 1.0, 0.0)
    rows = [Row(Draw(0.8, *filters, 3, position), mask) for position in range(n)]
    ids = [drawn.id or 0 for drawn in native.draw(logits.expand(n, 10), rows)]
    expected = n * torch.softmax(logits.double() / 0.8, 0).numpy()
    assert ((np.bincount(ids, minlength=10) - expected) ** 2 / expected).sum() < 33.7


def test_a_draw_for_several_rows_is_one_for_each(native: NativeSampler) -> None:
    rng = np.random.default_rng(5)
    rows = [row._replace(more=n % 4) for n, row in enumerate(rows_of(rng, 40, 64))]
    apart = [each for row in rows for each in row.apart]
    assert len(apart) == 40 + 60
    positions = {
        (row.draw.seed, row.draw.position + i) for row in rows for i in range(1 + row.more)
    }
    assert {(each.draw.seed, each.draw.position) for each in apart} == positions
    logits = torch.from_numpy(rng.normal(size=(100, 64)).astype(np.float32))
    for sampler in (native, TorchSampler()):
        assert sampler.draw(logits.clone(), rows) == sampler.draw(logits.clone(), apart)
    with pytest.raises(ValueError, match="100 rows of logits for 40 draws"):
        native.draw(logits, apart[:40])
