"""CUDA graphs of the forward pass for small batches: one launch a step instead of a thousand.

A graph has fixed shapes, so a batch is filled up to the next size in rows and in pages of the
longest sequence. Rows that fill up write to a spare page and see nothing else; the kernels give a
row the same bits in every batch, so the others cannot tell. A graph is recorded when its size is
first needed; where that fails, for want of memory say, such batches run kernel by kernel.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from rayseek.model.batch import PAGE_TOKENS, Batch

log = logging.getLogger("rayseek.model.graphs")

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256)
LEAST_PAGES = 16  # of the longest sequence; then doubled

Forward = Callable[[Batch], tuple[Tensor, Tensor | None]]  # logits, normed states


def size_of(batch: Batch) -> tuple[int, int] | None:
    """Rows and pages that a batch is filled up to; None: too large for a graph, or empty."""
    rows, pages = len(batch.ids_T), batch.page_table_BP.shape[1]
    enough = next((size for size in ROWS if size >= rows), None)
    if enough is None or not rows:
        return None
    return enough, max(LEAST_PAGES, 1 << (pages - 1).bit_length())


def filled_up(batch: Batch, rows: int, pages: int, spare_page: int) -> Batch:
    """The batch with more rows, which have one token in the spare page; logits of every row."""
    more = rows - len(batch.ids_T)
    sequences, width = batch.page_table_BP.shape
    table_BP = torch.full((rows, pages), spare_page, dtype=torch.int32)
    table_BP[:sequences, :width] = batch.page_table_BP
    # More rows than sequences, so the last line of the table is a spare one if any row is.
    added = {"slots_T": spare_page * PAGE_TOKENS, "sequence_T": rows - 1}
    filled = {
        name: torch.nn.functional.pad(getattr(batch, name), (0, more), value=added.get(name, 0))
        for name in ("ids_T", "positions_T", "slots_T", "sequence_T")
    }
    return Batch(**filled, page_table_BP=table_BP, out_rows_R=torch.arange(rows))


@dataclass(frozen=True, slots=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: Batch


class DecodeGraphs:
    """Graphs of one model's `forward`, by size.

    spare_page: a page that nobody owns. vocab, hidden: widths of what `forward` returns.
    """

    def __init__(
        self, forward: Forward, spare_page: int, vocab: int, hidden: int, device: torch.device
    ) -> None:
        self._forward, self._spare_page, self._device = forward, spare_page, device
        self._graphs: dict[tuple[int, int], _Graph | None] = {}  # None: it failed
        self._pool = torch.cuda.graph_pool_handle()
        # All graphs write here, so that none keeps outputs of its own.
        self._logits = torch.empty(ROWS[-1], vocab, device=device)
        self._normed = torch.empty(ROWS[-1], hidden, dtype=torch.bfloat16, device=device)

    def run(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """Logits of the batch's out rows and normed states of all; None: run it without a graph.

        batch: on the CPU. The logits are valid until the next call.
        """
        size = size_of(batch)
        if size is None:
            return None
        filled = filled_up(batch, *size, self._spare_page)
        if size not in self._graphs:
            self._graphs[size] = self._record(filled)
        recorded = self._graphs[size]
        if recorded is None:
            return None
        for part in fields(Batch):
            getattr(recorded.inputs, part.name).copy_(getattr(filled, part.name), non_blocking=True)
        recorded.graph.replay()
        rows = len(batch.ids_T)
        logits = self._logits[:rows]
        if len(batch.out_rows_R) != rows:
            logits = logits[batch.out_rows_R.to(self._device, non_blocking=True)]
        return logits, self._normed[:rows].clone()

    def _record(self, batch: Batch) -> _Graph | None:
        inputs = batch.to(self._device)
        self._pass(inputs)  # compiles what is not compiled yet, which a recording cannot
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Meanwhile other threads may hand pages over, which allocates and waits.
        recording = torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local")
        try:
            # A recording that cannot be ended would leave its stream the current one.
            with torch.cuda.stream(torch.cuda.current_stream()), recording:
                self._pass(inputs)
        except RuntimeError as error:
            log.warning("no CUDA graph of %d rows: %s", len(batch.ids_T), error)
            return None
        return _Graph(graph, inputs)

    def _pass(self, batch: Batch) -> None:
        logits, normed = self._forward(batch)
        self._logits[: len(logits)] = logits
        if normed is not None:
            self._normed[: len(normed)] = normed
