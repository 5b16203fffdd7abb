"""A batch in parts that take turns, so that one computes while rows of the others travel.

Parts are runs of rows in their order: a later part of a sequence attends to what an earlier one
has just written in the same layer. What the parts give is bit for bit what the batch gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rayseek.model.batch import Batch
from rayseek.model.moe import Underway

if TYPE_CHECKING:
    from rayseek.model.transformer import Block


def part_sizes(rows: int, parts: int) -> list[int]:
    """How many of the rows are in each part; they differ by one at most."""
    return [rows * (i + 1) // parts - rows * i // parts for i in range(parts)]


def split(batch: Batch, parts: int) -> list[Batch]:
    """The rows of a batch in parts of `part_sizes`, which may be empty; they want no logits."""
    sizes = part_sizes(len(batch.ids_T), parts)
    of_rows = zip(
        *(
            x.split(sizes)
            for x in (batch.ids_T, batch.positions_T, batch.slots_T, batch.sequence_T)
        ),
        strict=True,
    )
    return [
        replace(
            batch, ids_T=ids, positions_T=positions, slots_T=slots, sequence_T=sequence,
            out_rows_R=batch.out_rows_R[:0],
        )
        for ids, positions, slots, sequence in of_rows
    ]  # fmt: skip


def run_blocks(
    blocks: Sequence[Block],
    x_TD: Tensor,
    batch: Batch,
    layers: Sequence[Tensor],
    cos_sin_PR: Tensor,
    parts: int,
) -> Tensor:
    """All blocks over embedded rows [T, D], in parts; `layers` are the pages of each block.

    Between two layers the parts end and begin their exchanges in turn: while one attends, the
    products of the one before it and the rows of the one after it are on their way.
    """
    batches = split(batch, parts)
    under_way: list[Underway | None] = [None] * parts
    x = list(x_TD.split([len(b.ids_T) for b in batches]))
    for block, pages in zip(blocks, layers, strict=True):
        for i, part in enumerate(batches):
            before = under_way[i]
            x_part = x[i] if before is None else before.result()
            attended = block.attend(x_part, part, pages, cos_sin_PR)
            under_way[i] = block.feed_forward.begin(attended)
        for now in under_way:
            assert now is not None
            now.compute()
    return torch.cat([last.result() for last in under_way if last is not None])
