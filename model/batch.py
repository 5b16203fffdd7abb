"""The input of one forward pass: new rows of several sequences, back to back.

Passed explicitly to everything that needs it; nothing about a step is global.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from rayseek.kernels.kv_format import PAGE_TOKENS

__all__ = ["PAGE_TOKENS", "Batch"]


@dataclass(frozen=True, slots=True)
class Batch:
    """T new tokens of B sequences. A row attends to its own sequence up to its own position.

    ids_T        int64  token ids
    positions_T  int32  index of the token in its sequence, BOS at 0
    slots_T      int64  where its latent goes: page * PAGE_TOKENS + offset
    sequence_T   int32  which row of page_table_BP it belongs to
    page_table_BP int32 pages of each sequence in order; unused entries are 0
    out_rows_R   int64  rows whose logits are wanted
    """

    ids_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    sequence_T: Tensor
    page_table_BP: Tensor
    out_rows_R: Tensor

    def to(self, device: torch.device) -> Batch:
        """On another device, copied without waiting."""
        if self.ids_T.device == device:
            return self
        values = (getattr(self, field.name) for field in fields(self))
        return Batch(*(value.to(device, non_blocking=True) for value in values))

    @staticmethod
    def of_sequences(
        new_ids: list[list[int]],
        starts: list[int],
        pages: list[list[int]],
        out_rows: Sequence[int] | None = None,
    ) -> Batch:
        """Rows `starts[b] ...` of each sequence; logits of the last out_rows[b] of them.

        out_rows None: logits of every row. No sequences: a batch without rows.
        """
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        sequence: list[int] = []
        out: list[int] = []
        for b, (row_ids, start, table) in enumerate(zip(new_ids, starts, pages, strict=True)):
            first = len(ids)
            ids += row_ids
            stop = start + len(row_ids)
            positions += range(start, stop)
            slots += [table[p // PAGE_TOKENS] * PAGE_TOKENS + p % PAGE_TOKENS
                      for p in range(start, stop)]  # fmt: skip
            sequence += [b] * len(row_ids)
            out += range(first if out_rows is None else len(ids) - out_rows[b], len(ids))
        width = max((len(table) for table in pages), default=1)
        count = len(ids)
        # Two tensors, divided: six of their own, from lists, would take three times as long. The
        # table is not made of a list: one long context would make it long for every sequence.
        wide = torch.from_numpy(np.array(ids + slots + out, np.int64))
        narrow = np.zeros(2 * count + len(pages) * width, np.int32)
        narrow[: 2 * count] = positions + sequence
        for row, table in zip(narrow[2 * count :].reshape(-1, width), pages, strict=True):
            row[: len(table)] = table
        ids_T, slots_T, out_rows_R = wide.split_with_sizes([count, count, len(out)])
        positions_T, sequence_T, table_N = torch.from_numpy(narrow).split_with_sizes(
            [count, count, len(pages) * width]
        )
        return Batch(ids_T, positions_T, slots_T, sequence_T, table_N.view(-1, width), out_rows_R)
