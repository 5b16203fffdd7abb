"""What a CUDA graph would run: a batch filled up to a fixed size gives its rows the same bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayseek.model.batch import Batch
from rayseek.model.decode_graphs import LEAST_PAGES, ROWS, filled_up, size_of
from rayseek.model.latent_cache import LatentCache
from rayseek.model.transformer import Transformer


@given(rows=st.integers(1, 256), pages=st.integers(1, 2560))
@settings(max_examples=30)
def test_sizes_are_few_and_large_enough(rows: int, pages: int) -> None:
    ids = torch.zeros(rows, dtype=torch.int64)
    batch = Batch(ids, ids, ids, ids, torch.zeros(1, pages, dtype=torch.int32), ids)
    size = size_of(batch)
    assert size is not None
    assert size[0] in ROWS and rows <= size[0] <= 2 * rows
    assert pages <= size[1] < max(2 * pages, LEAST_PAGES + 1)


def test_large_and_empty_batches_have_no_graph() -> None:
    for rows in (0, 257):
        ids = torch.zeros(rows, dtype=torch.int64)
        table = torch.zeros(1, 1, dtype=torch.int32)
        assert size_of(Batch(ids, ids, ids, ids, table, ids)) is None


@pytest.mark.parametrize("counts", [[1], [1, 1, 1], [3, 2]])
def test_filling_up_changes_no_row(
    tiny_model: tuple[Transformer, object], counts: list[int]
) -> None:
    """One row or several of each sequence, after prompts of different lengths."""
    model = tiny_model[0]
    starts = [70, 5, 130][: len(counts)]
    tables = [[3, 7], [1], [0, 2, 4]][: len(counts)]
    ids = torch.randint(3, 200, (200,), generator=torch.Generator().manual_seed(1)).tolist()

    def cache_with_prompts() -> LatentCache:
        cache = LatentCache(model.config, 9, model.ops)
        prompts = [ids[:start] for start in starts]
        model(Batch.of_sequences(prompts, [0] * len(counts), tables), cache)
        return cache

    batch = Batch.of_sequences([ids[-n:] for n in counts], starts, tables)
    plain, filled = cache_with_prompts(), cache_with_prompts()
    size = size_of(batch)
    assert size is not None
    rows = max(size[0], sum(counts) + 1)
    expected = model(batch, plain)
    actual = model(filled_up(batch, rows, size[1], spare_page=8), filled)
    if model.ops.name == "native":
        assert torch.equal(actual[: len(expected)], expected)
    torch.testing.assert_close(actual[: len(expected)], expected)
    for one, other in zip(plain.layers, filled.layers, strict=True):
        assert torch.equal(one[:8], other[:8])  # only the spare page differs
        assert not one[8].any()
