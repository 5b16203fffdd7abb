"""The C++ bookkeeping of rows is the torch one, and both are what they say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayseek.kernels.native import NativeOps
from rayseek.kernels.native_build import NativeUnavailableError
from rayseek.kernels.row_places import NativePlaces, Route, RowPlaces, TorchPlaces


def native(words: int, top_k: int) -> RowPlaces:
    try:
        return NativePlaces(NativeOps().library, words, top_k)
    except NativeUnavailableError as error:
        pytest.skip(str(error))


@given(
    rows=st.integers(0, 30),
    top_k=st.integers(1, 4),
    slots=st.integers(1, 9),
    members=st.integers(1, 5),
    seed=st.integers(0, 999),
)
@settings(max_examples=60)
def test_rows_go_where_their_slots_are(
    rows: int, top_k: int, slots: int, members: int, seed: int
) -> None:
    make = torch.Generator().manual_seed(seed)
    member_S = torch.randint(0, members + 1, (slots + 1,), generator=make)
    member_S[-1] = members
    wide = torch.randint(-1, slots, (rows, top_k + 2), generator=make).int()
    wide[:, -1] %= members
    slot_RK, packed_RW = wide[:, 1:-1], wide  # slots lie in wider rows
    experts, replicas, extra = rows % 5 + 1, seed % 3 + 1, seed % 4
    table_ER = torch.randint(0, slots, (experts, replicas), generator=make).int()
    count_E = torch.randint(1, replicas + 1, (experts,), generator=make).int()
    expert_TK = torch.randint(0, experts, (rows, top_k), generator=make).int()
    route = Route(table_ER, count_E, member_S, members, 3)
    real = slot_RK.clamp(min=0) * 0 + torch.randint(0, slots, slot_RK.shape, generator=make).int()
    everyone = member_S.clamp(max=members - 1)
    for each in (native(3, top_k), TorchPlaces()):
        found = each.wanted(slot_RK, member_S, members)
        expected = [
            [r for r in range(rows) if m in member_S[slot_RK[r].long()].tolist()]
            for m in range(members)
        ]
        assert found[0].tolist() == sum(expected, []) and found[1] == [len(e) for e in expected]

        place_TK, counts = each.places(real, everyone, members)
        to = everyone[real.long()].flatten().tolist()
        order = sorted(range(len(to)), key=lambda i: to[i])
        assert [place_TK.flatten().tolist().index(i) for i in range(len(to))] == order
        assert counts == [to.count(m) for m in range(members)]

        first, mine = slots // 3, slots // 2
        seen_S = torch.full((mine,), 5)
        row_N, slot_N, homes = each.picked(packed_RW, top_k, first, seen_S, members)
        pairs = [
            (r, s - first)
            for r, row in enumerate(slot_RK.tolist())
            for s in row
            if s >= 0 and first <= s < first + mine
        ]
        assert list(zip(row_N.tolist(), slot_N.tolist(), strict=True)) == pairs
        at = [int(packed_RW[r, -1]) for r, _ in pairs]
        assert homes == [at.count(m) for m in range(members)]
        assert seen_S.tolist() == [5 + slot_N.tolist().count(s) for s in range(mine)]

        words_TW = torch.randint(-(2**31), 2**31, (rows, 6), generator=make).int()[:, 1:4]
        for every in (None, rows + extra):
            packed, slot_TK, sent = each.pack(route, words_TW, expert_TK, every)
            slots_of = [
                [int(table_ER[e, t % count_E[e]]) for e in row]
                for t, row in enumerate(expert_TK.tolist())
            ]
            assert slot_TK.shape == expert_TK.shape and slot_TK.tolist() == slots_of
            row = [[*w, *s, 3] for w, s in zip(words_TW.tolist(), slots_of, strict=True)]
            if every is None:
                to = [set(member_S[s].tolist()) for s in slots_of]
                by_member = [
                    [r for r, ms in zip(row, to, strict=True) if m in ms] for m in range(members)
                ]
            else:
                nothing = [0, 0, 0] + [-1] * top_k + [3]
                all_rows = row + [nothing] * extra
                by_member = [all_rows if m in member_S.tolist() else [] for m in range(members)]
            assert sent == [len(rows_of) for rows_of in by_member]
            assert packed.tolist() == sum(by_member, [])
