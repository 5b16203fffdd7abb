"""Which rows go where, and which of those that came are ours, when experts are spread over members.

Bookkeeping on small integers between two exchanges, in each layer: a dozen torch calls each, or one
of C++ (native_rows.h). `member_S`: int64, the member of each slot, with one more entry at the end
for slot -1; the number of members stands for nobody. Packed rows are int32: the words of a row, its
K slots, and the member that is its home.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from rayseek.kernels.native_build import LONG, POINTER

FEW = 512  # rows that are worth keeping memory for


@dataclass(frozen=True)
class Route:
    """The way of member `home`'s rows in one layer: expert e of row t is in slot
    table_ER[e, t % count_E[e]] (both int32), and the row goes to that one's member."""

    table_ER: Tensor
    count_E: Tensor
    member_S: Tensor
    members: int
    home: int

    @cached_property
    def receivers(self) -> frozenset[int]:
        """All members that rows may go to."""
        return frozenset(self.member_S.tolist()) - {self.members}

    @cached_property
    def native(self) -> _NativeRoute:
        return _NativeRoute(
            self.table_ER.data_ptr(), self.count_E.data_ptr(), self.member_S.data_ptr(),
            self.table_ER.shape[1], self.member_S.shape[0], self.members, self.home,
        )  # fmt: skip


class _NativeRoute(ctypes.Structure):
    _fields_ = (
        ("table", POINTER), ("count", POINTER), ("member", POINTER),
        ("replicas", LONG), ("entries", LONG), ("members", LONG), ("home", LONG),
    )  # fmt: skip


class Room:
    """Rows of memory for one purpose. A few are used again by whoever asks next: making a tensor
    and a view in each layer takes longer than filling it. width None: of single values."""

    def __init__(
        self,
        width: int | None,
        dtype: torch.dtype = torch.int32,
        device: torch.device | str = "cpu",
    ) -> None:
        self._all = torch.empty(0, *([] if width is None else [width]), dtype=dtype, device=device)
        self._first: dict[int, Tensor] = {}

    def rows(self, count: int) -> Tensor:
        """So many, with whatever is in them."""
        if count > FEW:
            return self._all.new_empty(count, *self._all.shape[1:])
        if count not in self._first:
            if count > len(self._all):
                self._all, self._first = self._all.new_empty(count, *self._all.shape[1:]), {}
            self._first[count] = self._all[:count]
        return self._first[count]

    def cut(self, rows: Tensor, count: int) -> Tensor:
        """The first of the rows that the last call gave."""
        return rows[:count] if len(rows) > FEW else self.rows(count)


class RowPlaces(Protocol):
    """One implementation; counts are by member, on the host. What a call gives is valid until the
    next one, for rows of another layer."""

    def places(self, slot_TK: Tensor, member_S: Tensor, members: int) -> tuple[Tensor, list[int]]:
        """Where each slot's product is once grouped by member, in order: int32 [T, K]."""

    def wanted(self, slot_RK: Tensor, member_S: Tensor, members: int) -> tuple[Tensor, list[int]]:
        """Rows grouped by the members that have one of their slots, each once: int32 [N]."""

    def pack(
        self, route: Route, words_TW: Tensor, expert_TK: Tensor, every: int | None
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Packed rows by the member that they go to, and the slots of all, int32 [T, K].

        every: None: a row goes to the members that have one of its slots; else as many rows go to
        each that has any slot, and rows from T on are of slots -1, which want nothing.
        """

    def picked(
        self, packed_RW: Tensor, top_k: int, first: int, seen_S: Tensor, members: int
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Row and local slot, int32 [N], of the slots from `first` on, as many as seen_S (int64)
        has counters, which grow by their rows; counts are by home."""


class TorchPlaces:
    """On any device; each count is a wait for it."""

    def places(self, slot_TK: Tensor, member_S: Tensor, members: int) -> tuple[Tensor, list[int]]:
        to_N = member_S[slot_TK].flatten()
        count_N = torch.arange(to_N.shape[0], dtype=torch.int32, device=to_N.device)
        place_N = torch.empty_like(count_N)
        place_N[to_N.argsort(stable=True)] = count_N
        return place_N.view(slot_TK.shape), torch.bincount(to_N, minlength=members).tolist()

    def wanted(self, slot_RK: Tensor, member_S: Tensor, members: int) -> tuple[Tensor, list[int]]:
        rows, device = slot_RK.shape[0], slot_RK.device
        wanted = torch.zeros(rows, members + 1, dtype=torch.bool, device=device)
        wanted_RM = wanted.scatter_(1, member_S[slot_RK], True)[:, :members]
        return wanted_RM.T.nonzero()[:, 1].int(), wanted_RM.sum(0).tolist()

    def pack(
        self, route: Route, words_TW: Tensor, expert_TK: Tensor, every: int | None
    ) -> tuple[Tensor, Tensor, list[int]]:
        (tokens, width), device = words_TW.shape, words_TW.device
        row_T = torch.arange(tokens, device=device)
        slot_TK = route.table_ER[expert_TK, row_T[:, None] % route.count_E[expert_TK]]
        if every is None:
            row_N, sent = self.wanted(slot_TK, route.member_S, route.members)
        else:
            sent = [every if member in route.receivers else 0 for member in range(route.members)]
            row_N = torch.arange(every, device=device).repeat(len(route.receivers))
        packed = words_TW.new_full((tokens + 1, width + slot_TK.shape[1] + 1), -1)
        packed[:tokens, :width], packed[:tokens, width:-1] = words_TW, slot_TK
        packed[tokens, :width], packed[:, -1] = 0, route.home
        return packed[row_N.clamp(max=tokens)], slot_TK, sent

    def picked(
        self, packed_RW: Tensor, top_k: int, first: int, seen_S: Tensor, members: int
    ) -> tuple[Tensor, Tensor, list[int]]:
        slot_RK = packed_RW[:, -1 - top_k : -1]
        local_RK = slot_RK - first
        ours_RK = (slot_RK >= 0) & (local_RK >= 0) & (local_RK < seen_S.shape[0])
        row_N, local_N = ours_RK.nonzero()[:, 0].int(), local_RK[ours_RK]
        seen_S += torch.bincount(local_N, minlength=seen_S.shape[0])
        counts = torch.bincount(packed_RW[:, -1][row_N], minlength=members).tolist()
        return row_N, local_N, counts


class NativePlaces:
    """On the CPU, by the library of `NativeOps`. Slots are int32 and contiguous within a row;
    experts and packed rows are contiguous. words: of a row; top_k: its slots."""

    def __init__(self, library: ctypes.CDLL, words: int, top_k: int) -> None:
        self._library = library
        self._packed, self._slot, self._place = Room(words + top_k + 1), Room(top_k), Room(top_k)
        self._row, self._local = Room(None), Room(None)

    def places(self, slot_TK: Tensor, member_S: Tensor, members: int) -> tuple[Tensor, list[int]]:
        slot_TK = slot_TK.contiguous()
        place_TK, counts = self._place.rows(slot_TK.shape[0]), (ctypes.c_int64 * members)()
        self._library.rs_row_places(
            slot_TK.data_ptr(), slot_TK.numel(), member_S.data_ptr(), member_S.shape[0], members,
            place_TK.data_ptr(), counts,
        )  # fmt: skip
        return place_TK, list(counts)

    def wanted(self, slot_RK: Tensor, member_S: Tensor, members: int) -> tuple[Tensor, list[int]]:
        rows, top_k = slot_RK.shape
        row_N, counts = torch.empty(rows * top_k, dtype=torch.int32), (ctypes.c_int64 * members)()
        found = self._library.rs_wanted_rows(
            slot_RK.data_ptr(), slot_RK.stride(0), rows, top_k, member_S.data_ptr(),
            member_S.shape[0], members, row_N.data_ptr(), counts,
        )  # fmt: skip
        return row_N[:found], list(counts)

    def pack(
        self, route: Route, words_TW: Tensor, expert_TK: Tensor, every: int | None
    ) -> tuple[Tensor, Tensor, list[int]]:
        (tokens, width), top_k, members = words_TW.shape, expert_TK.shape[1], route.members
        most = tokens * min(top_k, members) if every is None else every * len(route.receivers)
        packed, slot_TK = self._packed.rows(most), self._slot.rows(tokens)
        sent = (ctypes.c_int64 * members)()
        found = self._library.rs_pack_rows(
            ctypes.byref(route.native), words_TW.data_ptr(), words_TW.stride(0), tokens, width,
            expert_TK.data_ptr(), top_k, -1 if every is None else every, slot_TK.data_ptr(),
            packed.data_ptr(), sent,
        )  # fmt: skip
        return self._packed.cut(packed, found), slot_TK, list(sent)

    def picked(
        self, packed_RW: Tensor, top_k: int, first: int, seen_S: Tensor, members: int
    ) -> tuple[Tensor, Tensor, list[int]]:
        rows, width = packed_RW.shape
        row_N, local_N = self._row.rows(rows * top_k), self._local.rows(rows * top_k)
        counts = (ctypes.c_int64 * members)()
        found = self._library.rs_picked_slots(
            packed_RW.data_ptr(), width, rows, top_k, first, seen_S.shape[0], members,
            row_N.data_ptr(), local_N.data_ptr(), counts, seen_S.data_ptr(),
        )  # fmt: skip
        return self._row.cut(row_N, found), self._local.cut(local_N, found), list(counts)
