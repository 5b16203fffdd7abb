"""Documents packed into rows of fixed length, and rows into batches of a fixed number of tokens.

Best fit, longest first, one shard at a time: over 99 % of the tokens are real. Documents never
attend to each other. The gap at the end of a row repeats the beginning of its first document with
no weight, so that routers see text only.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rayseek.model.training.corpus import FULL_WEIGHT, Shard


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """T tokens in rows of `row_tokens`; all arrays [T].

    position: index of a token in its document. next/after: the tokens one and two further on in
    the same document, with the weights 0..1 of predicting them (0 where there is none).
    """

    row_tokens: int
    ids: NDArray[np.int64]
    position: NDArray[np.int64]
    next_ids: NDArray[np.int64]
    next_weight: NDArray[np.float32]
    after_ids: NDArray[np.int64]
    after_weight: NDArray[np.float32]


Row = list[int]  # documents of a shard, in the order in which they lie in the row


def pack_rows(
    lengths: Sequence[int], batch_tokens: int, row_tokens: Sequence[int]
) -> list[tuple[int, list[Row]]]:
    """(row length, rows) of documents of these lengths, in batches of whole `batch_tokens`.

    A document goes into rows of the shortest of the lengths `row_tokens` that it fits in, or
    earlier if it fills up a batch of longer rows; one longer than all of them is left out, and
    so is what does not fill the last batch.
    """
    todo = sorted(range(len(lengths)), key=lambda d: -lengths[d])
    todo = [d for d in todo if lengths[d] <= max(row_tokens)]
    packed: list[tuple[int, list[Row]]] = []
    sizes = sorted(row_tokens, reverse=True)
    for size, shorter in zip(sizes, [*sizes[1:], 0], strict=True):
        per_batch = batch_tokens // size
        rows, todo = _best_fit(todo, lengths, size, shorter, per_batch)
        packed += [
            (size, rows[i : i + per_batch]) for i in range(0, len(rows) - per_batch + 1, per_batch)
        ]
    return packed


def _best_fit(
    todo: list[int], lengths: Sequence[int], size: int, shorter: int, per_batch: int
) -> tuple[list[Row], list[int]]:
    """Rows of `size` for all documents longer than `shorter`, and the documents left over.

    The number of rows is raised to whole batches, which shorter documents fill.
    """
    rows: list[Row] = []
    by_room: list[list[int]] = [[] for _ in range(size + 1)]  # rows with so much room
    rooms: list[int] = []  # the rooms that some row has, ascending
    left: list[int] = []
    for d in todo:
        n = lengths[d]
        at = bisect_left(rooms, n)
        if at < len(rooms):
            room = rooms[at]
            row = by_room[room].pop()
            if not by_room[room]:
                del rooms[at]
        elif n > shorter or len(rows) % per_batch:
            row, room = len(rows), size
            rows.append([])
        else:
            left.append(d)
            continue
        rows[row].append(d)
        room -= n
        if not by_room[room]:
            rooms.insert(bisect_left(rooms, room), room)
        by_room[room].append(row)
    return rows, left


def lay_out(shard: Shard, rows: list[Row], row_tokens: int) -> PackedBatch:
    """The tokens of these rows."""
    shape = (len(rows), row_tokens)
    ids, position = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    next_ids, after_ids = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    next_weight, after_weight = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for r, row in enumerate(rows):
        begin = 0
        for d in row:
            text, weight = shard.document(d)
            n = len(text)
            end = begin + n
            ids[r, begin:end] = text
            position[r, begin:end] = np.arange(n)
            share = weight.astype(np.float32) / FULL_WEIGHT
            next_ids[r, begin : end - 1] = text[1:]
            next_weight[r, begin : end - 1] = share[1:]
            if n > 2:
                after_ids[r, begin : end - 2] = text[2:]
                after_weight[r, begin : end - 2] = share[2:]
            begin = end
        filler = ids[r, : row_tokens - begin]
        ids[r, begin:] = filler
        position[r, begin:] = np.arange(len(filler))
        next_ids[r, begin:-1] = filler[1:]
    return PackedBatch(
        row_tokens, ids.ravel(), position.ravel(), next_ids.ravel(), next_weight.ravel(),
        after_ids.ravel(), after_weight.ravel(),
    )  # fmt: skip


def thin(batch: PackedBatch, random: np.random.Generator) -> PackedBatch:
    """Partly weighted predictions either count in full or not at all, with the same expectation.

    The head is only computed where a weight is above 0, and prompts have small weights.
    """

    def drawn(weight: NDArray[np.float32]) -> NDArray[np.float32]:
        return (random.random(weight.shape, np.float32) < weight).astype(np.float32)

    return replace(
        batch, next_weight=drawn(batch.next_weight), after_weight=drawn(batch.after_weight)
    )
