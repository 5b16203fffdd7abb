"""The input of a pass, against its definition, and what one long context costs the others."""

from __future__ import annotations

import tracemalloc

import torch
from hypothesis import given
from hypothesis import strategies as st

from rayseek.model.batch import PAGE_TOKENS, Batch

LENGTHS = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 70)), max_size=5)


@given(LENGTHS, st.booleans())
def test_rows_slots_and_pages_are_where_the_definition_says(
    lengths: list[tuple[int, int]], all_out: bool
) -> None:
    """lengths: of each sequence, what is computed and how many rows are new."""
    starts = [start for start, _ in lengths]
    new_ids = [[7 * b + i for i in range(rows)] for b, (_, rows) in enumerate(lengths)]
    pages = [
        [100 * b + i + 1 for i in range(1 + (start + rows) // PAGE_TOKENS)]
        for b, (start, rows) in enumerate(lengths)
    ]
    out_rows = None if all_out else [min(2, rows) for _, rows in lengths]
    batch = Batch.of_sequences(new_ids, starts, pages, out_rows)
    rows = [(b, i) for b, (_, n) in enumerate(lengths) for i in range(n)]
    assert batch.ids_T.tolist() == [7 * b + i for b, i in rows]
    assert batch.sequence_T.tolist() == [b for b, _ in rows]
    places = [(b, starts[b] + i) for b, i in rows]
    assert batch.positions_T.tolist() == [p for _, p in places]
    assert batch.slots_T.tolist() == [
        pages[b][p // PAGE_TOKENS] * PAGE_TOKENS + p % PAGE_TOKENS for b, p in places
    ]
    width = max(map(len, pages), default=1)
    assert batch.page_table_BP.shape == (len(lengths), width)
    assert batch.page_table_BP.tolist() == [t + [0] * (width - len(t)) for t in pages]
    assert batch.out_rows_R.tolist() == [
        r for r, (b, i) in enumerate(rows) if all_out or i >= lengths[b][1] - 2
    ]
    assert {t.dtype for t in (batch.ids_T, batch.slots_T, batch.out_rows_R)} == {torch.int64}
    narrow = (batch.positions_T, batch.sequence_T, batch.page_table_BP)
    assert {t.dtype for t in narrow} == {torch.int32}


def test_one_long_context_makes_no_long_list_for_the_others() -> None:
    """The table is as wide as the longest; nothing else is, or every step pays for it."""
    pages = [list(range(2000)), *([1] for _ in range(127))]
    tracemalloc.start()
    try:
        batch = Batch.of_sequences([[5]] * 128, [0] * 128, pages)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1.2 * batch.page_table_BP.nbytes
