"""A token for each row of logits: edits, bans, a grammar's mask, then the draw (spec section 6.1).

A row is decided by its own `Row` and logits alone. `TorchSampler` is the definition, for any
device; `NativeSampler` is one call of C++ for all rows. They agree wherever logits + noise of two
ids, or a sum of probabilities and its limit, are further apart than float32 rounds: their
logarithms and exponentials differ in the last bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence as Rows
from struct import Struct
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayseek.kernels.sample import Draw, sample, top_logprobs

_U64 = 0xFFFFFFFFFFFFFFFF
_DRAW = Struct("@QqPPPqfffiiii0q")  # struct Draw of native_sample.h


class Edit(NamedTuple):
    """A change of some logits: x + value, or as a penalty x / value where x > 0, else x * value."""

    ids_N: Tensor  # int64, on the CPU, each id once
    values_N: Tensor  # float32
    penalty: bool = False


class Row(NamedTuple):
    """How one row's token is chosen. Edits are made first, in order.

    more: so many rows behind this one are drawn likewise, each one position further on.
    """

    draw: Draw
    banned_V: Tensor  # float32 on the logits' device: 0, or -inf for ids that are never chosen
    edits: tuple[Edit, ...] = ()
    allowed_V: NDArray[np.uint8] | None = None  # 0: the grammar forbids it; None: no grammar
    logprobs: int | None = None  # wanted besides the token's own: of so many most likely ids
    more: int = 0

    @property
    def apart(self) -> list[Row]:
        at = self.draw.position
        return [
            self._replace(draw=self.draw._replace(position=at + i), more=0)
            for i in range(1 + self.more)
        ]


class Drawn(NamedTuple):
    """A row's token; None if its logits are not finite. Log-probabilities: of unmodified logits.

    Where no id is left to choose from, the token is one that may not be chosen.
    """

    id: int | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler(Protocol):
    """One way to carry this out; `name` is part of the fingerprint."""

    name: str

    def draw(self, logits_RV: Tensor, rows: Rows[Row]) -> list[Drawn]:
        """A token for each row of logits_RV, float32, consumed."""


class TorchSampler:
    """In PyTorch; on a GPU by its own kernels, with one wait for the host."""

    name = "torch"

    def draw(self, logits_RV: Tensor, rows: Rows[Row]) -> list[Drawn]:
        rows = [each for row in rows for each in row.apart]
        raw = {r: logits_RV[r].clone() for r, row in enumerate(rows) if row.logprobs is not None}
        finite_R, device = torch.isfinite(logits_RV).all(dim=1), logits_RV.device
        for logits_V, row in zip(logits_RV, rows, strict=True):
            for edit in row.edits:
                apply_edit(logits_V, edit)
        masks = {id(row.banned_V): row.banned_V for row in rows}
        shared = len(masks) == 1  # by all rows, as almost always
        logits_RV += rows[0].banned_V if shared else torch.stack([row.banned_V for row in rows])
        bound = [r for r, row in enumerate(rows) if row.allowed_V is not None]
        if bound:
            allowed_MV = np.stack([a for row in rows if (a := row.allowed_V) is not None])
            barred_MV = torch.from_numpy(allowed_MV == 0).to(device, non_blocking=True)
            bound_M = torch.tensor(bound).to(device, non_blocking=True)
            logits_RV[bound_M] = logits_RV[bound_M].masked_fill_(barred_MV, -torch.inf)
        ids = sample(logits_RV, [row.draw for row in rows])
        drawn = [
            Drawn(token if finite else None)
            for token, finite in zip(ids, finite_R.tolist(), strict=True)
        ]
        for r, raw_V in raw.items():
            if drawn[r].id is not None:
                logprob, top = top_logprobs(raw_V, ids[r], rows[r].logprobs or 0)
                drawn[r] = Drawn(ids[r], logprob, tuple(top))
        return drawn


class NativeSampler:
    """In C++ (`native_sample.h`), for logits on the CPU."""

    name = "native"

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def draw(self, logits_RV: Tensor, rows: Rows[Row]) -> list[Drawn]:
        if logits_RV.stride(-1) != 1 or logits_RV.dtype is not torch.float32:
            logits_RV = logits_RV.float().contiguous()
        count, vocab = logits_RV.shape
        if count != sum(1 + row.more for row in rows):
            raise ValueError(f"{count} rows of logits for {len(rows)} draws and those behind them")
        packed = PackedDraws(rows, vocab)
        most = packed.most
        ids, logprob = (ctypes.c_int32 * count)(), (ctypes.c_float * count)()
        top_ids, top = (ctypes.c_int32 * (count * most))(), (ctypes.c_float * (count * most))()
        self._library.rs_draw(
            logits_RV.data_ptr(), logits_RV.stride(0), count, vocab, packed.bytes, most,
            ids, logprob, top_ids, top,
        )  # fmt: skip
        drawn: list[Drawn] = []
        for row in rows:
            for _ in range(1 + row.more):
                r = len(drawn)
                if ids[r] < 0:
                    drawn.append(Drawn(None))
                elif row.logprobs is None:
                    drawn.append(Drawn(ids[r]))
                else:
                    best = slice(r * most, r * most + min(row.logprobs, vocab))
                    pairs = tuple(zip(top_ids[best], top[best], strict=True))
                    drawn.append(Drawn(ids[r], logprob[r], pairs))
        return drawn


class PackedDraws:
    """`struct Draw` of each row, and what it points into. most: logprobs that a row wants."""

    def __init__(self, rows: Rows[Row], vocab: int) -> None:
        self._held: list[object] = list(rows)
        packed = bytearray()
        self.most = 0
        for d, banned_V, edits, allowed_V, logprobs, more in rows:
            edits_at = allowed_at = None
            if edits:
                array = np.array(
                    [(e.ids_N.data_ptr(), e.values_N.data_ptr(), len(e.ids_N), e.penalty)
                     for e in edits], dtype=np.int64,
                )  # fmt: skip
                self._held.append(array)
                edits_at = array.ctypes.data
            if allowed_V is not None:
                allowed_V = np.ascontiguousarray(allowed_V)
                self._held.append(allowed_V)
                allowed_at = allowed_V.ctypes.data
            if logprobs is not None:
                self.most = max(self.most, logprobs)
            packed += _DRAW.pack(
                d.seed & _U64, d.position, banned_V.data_ptr(), allowed_at or 0, edits_at or 0,
                len(edits), d.temperature, d.top_p, d.min_p, min(d.top_k, vocab), d.greedy,
                -1 if logprobs is None else min(logprobs, vocab), more,
            )  # fmt: skip
        self.bytes = bytes(packed)


def apply_edit(logits_V: Tensor, edit: Edit) -> None:
    """In place, on any device."""
    device = logits_V.device
    ids = edit.ids_N.to(device, non_blocking=True)
    values = edit.values_N.to(device, non_blocking=True)
    old = logits_V[ids]
    if edit.penalty:
        logits_V[ids] = torch.where(old > 0, old / values, old * values)
    else:
        logits_V[ids] = old + values
