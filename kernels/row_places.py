"""Which rows go where, and which of those that came are ours, when experts are spread over members.

Bookkeeping on small integers between two exchanges, in each layer: a dozen torch calls each, or one
of C++ (native_rows.h). `member_S`: int64, the member of each slot, with one more entry at the end
for slot -1; the number of members stands for nobody.
"""

from __future__ import annotations

import ctypes
from typing import Protocol

import torch
from torch import Tensor


class RowPlaces(Protocol):
    """One implementation; counts are by member, on the host."""

    def places(self, slot_TK: Tensor, member_S: Tensor, members: int) -> tuple[Tensor, list[int]]:
        """Where each slot's product is once grouped by member, in order: int32 [T, K]."""

    def wanted(self, slot_RK: Tensor, member_S: Tensor, members: int) -> tuple[Tensor, list[int]]:
        """Rows grouped by the members that have one of their slots, each once: int32 [N]."""

    def picked(
        self, slot_RK: Tensor, first: int, slots: int, home_R: Tensor, members: int
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Row and local slot, int32 [N], of `slots` slots from `first` on; counts are by home."""


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

    def picked(
        self, slot_RK: Tensor, first: int, slots: int, home_R: Tensor, members: int
    ) -> tuple[Tensor, Tensor, list[int]]:
        local_RK = slot_RK - first
        ours_RK = (slot_RK >= 0) & (local_RK >= 0) & (local_RK < slots)
        row_N = ours_RK.nonzero()[:, 0].int()
        counts = torch.bincount(home_R[row_N], minlength=members).tolist()
        return row_N, local_RK[ours_RK], counts


class NativePlaces:
    """On the CPU, by the library of `NativeOps`. Slots are int32 and contiguous within a row."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def places(self, slot_TK: Tensor, member_S: Tensor, members: int) -> tuple[Tensor, list[int]]:
        slot_TK = slot_TK.contiguous()
        place_TK, counts = torch.empty_like(slot_TK), (ctypes.c_int64 * members)()
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

    def picked(
        self, slot_RK: Tensor, first: int, slots: int, home_R: Tensor, members: int
    ) -> tuple[Tensor, Tensor, list[int]]:
        rows, top_k = slot_RK.shape
        pairs = torch.empty(2, rows * top_k, dtype=torch.int32)
        counts = (ctypes.c_int64 * members)()
        found = self._library.rs_picked_slots(
            slot_RK.data_ptr(), slot_RK.stride(0), rows, top_k, first, slots, home_R.data_ptr(),
            home_R.stride(0), members, pairs[0].data_ptr(), pairs[1].data_ptr(), counts,
        )  # fmt: skip
        return pairs[0, :found], pairs[1, :found], list(counts)
