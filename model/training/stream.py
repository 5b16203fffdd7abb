"""The order in which a run meets its batches: shard after shard, each packed and shuffled.

A position is two numbers, so a run can stop anywhere and go on exactly. The order depends on the
seed and on the shards alone, not on the number of workers.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rayseek.model.training.corpus import Shard, read_shard, shard_path
from rayseek.model.training.packing import PackedBatch, Row, lay_out, pack_rows, thin


@dataclass(frozen=True, slots=True)
class Position:
    """The next batch: `batch` of the `shard`-th shard read, counted through all repetitions."""

    shard: int = 0
    batch: int = 0


class BatchStream:
    """Batches of a corpus from a position on; `position` is always the next one's."""

    def __init__(
        self, folder: Path, shards: int, batch_tokens: int, row_tokens: tuple[int, ...], seed: int,
        position: Position, thinned: bool = True,
    ) -> None:  # fmt: skip
        self.folder, self.shards, self.seed = folder, shards, seed
        self.batch_tokens, self.row_tokens = batch_tokens, row_tokens
        self.position, self.thinned = position, thinned
        self._open: tuple[int, Shard, list[tuple[int, list[Row]]]] | None = None

    def take(self, rank: int = 0, workers: int = 1) -> PackedBatch:
        """The rank's of the next `workers` batches; all workers must call this in step."""
        mine: PackedBatch | None = None
        for worker in range(workers):
            shard, batches = self._current()
            if worker == rank:
                size, rows = batches[self.position.batch]
                mine = lay_out(shard, rows, size)
                if self.thinned:
                    at = self.position.shard, self.position.batch
                    mine = thin(mine, np.random.default_rng((self.seed, *at)))
            self.position = Position(self.position.shard, self.position.batch + 1)
        assert mine is not None
        return mine

    def _current(self) -> tuple[Shard, list[tuple[int, list[Row]]]]:
        skipped = 0
        while True:
            number = self.position.shard
            if self._open is None or self._open[0] != number:
                self._open = (number, *self._read(number))
            if self.position.batch < len(self._open[2]):
                return self._open[1], self._open[2]
            self.position = Position(number + 1, 0)
            skipped += 1
            if skipped > self.shards:
                raise ValueError(f"{self.folder}: no shard fills a batch of {self.batch_tokens}")

    def _read(self, number: int) -> tuple[Shard, list[tuple[int, list[Row]]]]:
        path = shard_path(self.folder, number % self.shards)
        if not path.exists():
            print(f"waiting for {path}")
            while not path.exists():
                time.sleep(1)
        shard = read_shard(path)
        order = np.random.default_rng((self.seed, number))
        lengths = np.diff(shard.starts).tolist()
        return shard, _mixed(pack_rows(lengths, self.batch_tokens, self.row_tokens), order)


def _mixed(
    packed: list[tuple[int, list[Row]]], order: np.random.Generator
) -> list[tuple[int, list[Row]]]:
    """Rows of one length dealt anew among their batches, batches and their documents shuffled.

    Best fit leaves the longest documents in the first rows; without this a batch would hold
    documents of one kind.
    """
    dealt: list[tuple[int, list[Row]]] = []
    for size in sorted({size for size, _ in packed}):
        groups = [rows for s, rows in packed if s == size]
        rows = [row for group in groups for row in group]
        shuffled = [rows[i] for i in order.permutation(len(rows))]
        each = len(groups[0])
        dealt += [(size, shuffled[i : i + each]) for i in range(0, len(shuffled), each)]
    mixed = [dealt[i] for i in order.permutation(len(dealt))]
    return [
        (size, [[row[i] for i in order.permutation(len(row))] for row in rows])
        for size, rows in mixed
    ]
