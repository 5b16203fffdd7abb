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

    def pack(self, words_TW: Tensor, slot_TK: Tensor, home: int, row_N: Tensor) -> Tensor:
        """int32 [N, W + K + 1]: words, slots and home of the rows row_N (int32). An index from T
        on is a row of slots -1, which wants nothing."""

    def picked(
        self, slot_RK: Tensor, first: int, seen_S: Tensor, home_R: Tensor, members: int
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

    def pack(self, words_TW: Tensor, slot_TK: Tensor, home: int, row_N: Tensor) -> Tensor:
        tokens, width = words_TW.shape
        packed = words_TW.new_full((tokens + 1, width + slot_TK.shape[1] + 1), -1)
        packed[:tokens, :width], packed[:tokens, width:-1] = words_TW, slot_TK
        packed[tokens, :width], packed[:, -1] = 0, home
        return packed[row_N.clamp(max=tokens)]

    def picked(
        self, slot_RK: Tensor, first: int, seen_S: Tensor, home_R: Tensor, members: int
    ) -> tuple[Tensor, Tensor, list[int]]:
        local_RK = slot_RK - first
        ours_RK = (slot_RK >= 0) & (local_RK >= 0) & (local_RK < seen_S.shape[0])
        row_N, local_N = ours_RK.nonzero()[:, 0].int(), local_RK[ours_RK]
        seen_S += torch.bincount(local_N, minlength=seen_S.shape[0])
        counts = torch.bincount(home_R[row_N], minlength=members).tolist()
        return row_N, local_N, counts


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

    def pack(self, words_TW: Tensor, slot_TK: Tensor, home: int, row_N: Tensor) -> Tensor:
        tokens, width = words_TW.shape
        rows, slot_TK = row_N.shape[0], slot_TK.contiguous()
        packed = torch.empty(rows, width + slot_TK.shape[1] + 1, dtype=torch.int32)
        self._library.rs_pack_rows(
            words_TW.data_ptr(), words_TW.stride(0), tokens, width, slot_TK.data_ptr(),
            slot_TK.shape[1], home, row_N.data_ptr(), rows, packed.data_ptr(),
        )  # fmt: skip
        return packed

    def picked(
        self, slot_RK: Tensor, first: int, seen_S: Tensor, home_R: Tensor, members: int
    ) -> tuple[Tensor, Tensor, list[int]]:
        rows, top_k = slot_RK.shape
        row_N = torch.empty(rows * top_k, dtype=torch.int32)
        local_N, counts = torch.empty_like(row_N), (ctypes.c_int64 * members)()
        found = self._library.rs_picked_slots(
            slot_RK.data_ptr(), slot_RK.stride(0), rows, top_k, first, seen_S.shape[0],
            home_R.data_ptr(), home_R.stride(0), members, row_N.data_ptr(), local_N.data_ptr(),
            counts, seen_S.data_ptr(),
        )  # fmt: skip
        return row_N[:found], local_N[:found], list(counts)
