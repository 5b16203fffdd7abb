"""Placements follow each other within the holders' memory, or it is said that they cannot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayseek.cluster.config import Config, load_config
from rayseek.cluster.fit import bearable_deaths, room
from rayseek.cluster.layout import UNIT_NAMES, layout
from rayseek.cluster.placement import slots_per_holder
from rayseek.cluster.plan import Member, UnitPlan, Wanted, next_plan
from rayseek.cluster.succession import Room, peak
from rayseek.model.official import DEEPSEEK_V3

EXPERTS, LAYERS = 16, (1, 2, 3)
EVEN = {layer: [1.0] * EXPERTS for layer in LAYERS}
loads = st.fixed_dictionaries(
    {layer: st.lists(st.floats(0, 9), min_size=EXPERTS, max_size=EXPERTS) for layer in LAYERS}
)
rooms = st.builds(Room, st.integers(1, 2 * EXPERTS), st.booleans())


def wanted(experts: int, redundant: int = 0, room: Room | None = None) -> Wanted:
    return Wanted(1, experts, redundant, EXPERTS, 4, LAYERS, room=room)


def crew(names: list[int]) -> list[Member]:
    ranks = [Member(f"e{i}", "expert", f"n{i % 2}", "h:1") for i in names]
    return [Member("a", "attention", "n0", "h:1"), *ranks]


def slots_of(plan: UnitPlan, name: str) -> dict[int, tuple[int, ...]]:
    """Layer -> experts of a holder; empty if it is none."""
    holder = plan.holder_of(name)
    if holder is None:
        return {}
    return {layer: plan.placement.experts_of(holder, layer) for layer in LAYERS}


def in_memory(
    old: dict[int, tuple[int, ...]], new: dict[int, tuple[int, ...]], whole: bool, release: bool
) -> int:
    """The most slots there at once, by going through it: allocating, and freeing what may go.
    Counted between two layers; what was there before is no news."""

    def pieces(layers: dict[int, tuple[int, ...]], layer: int) -> dict[object, int]:
        experts = layers.get(layer, ())
        return {experts: len(experts)} if whole else dict.fromkeys(experts, 1)

    there = {(layer, p): n for layer in old for p, n in pieces(old, layer).items()}
    for layer in new:
        there |= {(layer, p): n for p, n in pieces(new, layer).items()}
        if release:
            kept = pieces(new, layer)
            there = {k: n for k, n in there.items() if k[0] != layer or k[1] in kept}
    return sum(there.values())


@given(st.integers(1, 5), st.integers(0, 10), rooms, st.data())
def test_no_plan_needs_more_memory_than_there_is(
    experts: int, redundant: int, room: Room, data: st.DataObject
) -> None:
    want = wanted(experts, redundant, room)
    plan = next_plan(None, crew(list(range(experts))), want, data.draw(loads))
    enough = -(-EXPERTS // experts) <= room.slots
    assert isinstance(plan, UnitPlan) == enough
    if not isinstance(plan, UnitPlan):
        assert f"the memory of {experts} ranks, {room.slots} in each" in plan
        return
    for _ in range(4):
        present = data.draw(st.lists(st.integers(0, 8), unique=True, min_size=1))
        broken = bool({m.name for m in plan.members} - {m.name for m in crew(present)})
        following = next_plan(
            plan, crew(present), want, data.draw(loads),
            rebalance=data.draw(st.booleans()), broken=broken,
        )  # fmt: skip
        taking = min(len(present), experts)
        if isinstance(following, str):
            held = plan.placement.slots_per_holder
            assert (-(-EXPERTS // taking) + held) > room.slots, "each could hold both"
            continue
        assert not following.placement.uncovered(range(taking))
        for member in following.members[1:]:
            old, new = slots_of(plan, member.name), slots_of(following, member.name)
            assert in_memory(old, new, room.whole_layers, broken) <= room.slots * len(LAYERS)
            assert all(len(set(held)) == len(held) for held in new.values())
        plan = following


@given(st.integers(1, 5), st.integers(0, 6), loads, loads, st.data())
def test_peak_is_what_a_holder_goes_through(
    experts: int, redundant: int, first: dict[int, list[float]], then: dict[int, list[float]],
    data: st.DataObject,
) -> None:  # fmt: skip
    whole, release = data.draw(st.booleans()), data.draw(st.booleans())
    old = next_plan(None, crew(list(range(experts))), wanted(experts, redundant), first)
    assert isinstance(old, UnitPlan)
    names = data.draw(st.lists(st.integers(0, 7), unique=True, min_size=1, max_size=experts))
    new = next_plan(old, crew(names), wanted(experts, redundant), then, rebalance=True)
    assert isinstance(new, UnitPlan)
    became = {
        h: there
        for h, rank in enumerate(old.holders)
        if (there := new.holder_of(old.members[rank].name)) is not None
    }
    assert peak(old.placement, new.placement, became, whole, release) == max(
        in_memory(slots_of(old, m.name), slots_of(new, m.name), whole, release)
        for m in new.members[1:]
    )


@given(st.integers(2, 5), st.integers(0, 6), loads, st.data())
def test_a_successor_takes_the_place_of_the_dead_and_nobody_else_moves(
    experts: int, redundant: int, lately: dict[int, list[float]], data: st.DataObject
) -> None:
    want = wanted(experts, redundant)
    before = next_plan(None, crew(list(range(experts))), want, lately)
    assert isinstance(before, UnitPlan)
    dead = data.draw(st.integers(0, experts - 1))
    there = [i for i in range(experts) if i != dead] + [dead + 10]
    after = next_plan(before, crew(there), want, EVEN, broken=True)
    assert isinstance(after, UnitPlan)
    for i in range(experts):
        heir = f"e{i}" if i != dead else f"e{dead + 10}"
        assert slots_of(after, heir) == slots_of(before, f"e{i}")


def test_survivors_take_over_in_memory_in_which_they_could_not_rebalance() -> None:
    """Of 4 holders of 4 experts each one dies: 6 fit, and not beside the 4 in use."""
    want = wanted(4, room=Room(8, whole_layers=True))
    plan = next_plan(None, crew([0, 1, 2, 3]), want, EVEN)
    assert isinstance(plan, UnitPlan)
    assert isinstance(next_plan(plan, crew([0, 1, 2]), want, EVEN, broken=True), UnitPlan)
    assert isinstance(next_plan(plan, crew([0, 1, 2]), want, EVEN), str)  # one leaves: wait
    tight = replace(want, room=Room(5))
    why = next_plan(plan, crew([0, 1, 2]), tight, EVEN, broken=True)
    assert why == (
        "16 experts of a layer do not fit into the memory of 3 ranks, 5 in each: waiting for "
        "another rank"
    )


@pytest.mark.parametrize(
    ("slots", "changed"), [(9, []), (10, []), (11, [2]), (13, [2]), (14, [1, 2]), (16, [1, 2])]
)
def test_a_rebalance_changes_as_many_layers_as_there_is_room_for(
    slots: int, changed: list[int]
) -> None:
    """8 slots of each of 3 layers are in use; a layer that changes takes 8 more meanwhile."""
    skewed = {1: [9.0] * 8 + [1.0] * 8, 2: [90.0] * 8 + [1.0] * 8, 3: [1.0] * 16}
    want = wanted(2, room=Room(slots, whole_layers=True))
    plan = next_plan(None, crew([0, 1]), want, EVEN)
    assert isinstance(plan, UnitPlan)
    after = next_plan(plan, crew([0, 1]), want, skewed, rebalance=True)
    assert isinstance(after, UnitPlan)
    old, new = plan.placement.slots, after.placement.slots
    assert [layer for layer in LAYERS if old[layer] != new[layer]] == changed


def test_a_newcomer_is_taken_in_even_if_the_others_have_no_room_to_change() -> None:
    want = wanted(4, redundant=16, room=Room(8, whole_layers=True))
    plan = next_plan(None, crew([0, 1, 2, 3]), want, EVEN)
    assert isinstance(plan, UnitPlan)
    less = next_plan(plan, crew([0, 1, 2]), want, EVEN, broken=True)
    assert isinstance(less, UnitPlan)
    hot = {layer: [1.0] * 15 + [50.0] for layer in LAYERS}
    again = next_plan(less, crew([0, 1, 2, 7]), want, hot)
    assert isinstance(again, UnitPlan)
    for i in range(3):
        assert slots_of(again, f"e{i}") == slots_of(less, f"e{i}")
    for layer, experts in slots_of(again, "e7").items():
        assert 15 in experts and len(experts) == less.placement.slots_per_holder, layer


CONFIGS = Path(__file__).parents[2] / "cluster" / "configs"


@pytest.mark.parametrize("name", ["h200-8", "h800-16", "h800-cell-18"])
def test_room_is_what_the_ledger_leaves(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    for role, unit in config.units.items():
        found = room(config, DEEPSEEK_V3, role)
        least = slots_per_holder(256, unit.holders, unit.redundant_experts)
        assert found is not None and found.whole_layers and found.slots >= least
        deaths = bearable_deaths(config, DEEPSEEK_V3, role)
        wanted = layout(config, DEEPSEEK_V3)[UNIT_NAMES[role]].unit.wanted  # type: ignore[union-attr]
        before = _even(wanted, unit.holders)
        assert deaths is not None
        for more, plan in ((0, UnitPlan), (1, str)):
            left = _crew(unit.holders - deaths - more)
            loads = {layer: [1.0] * 256 for layer in wanted.layers}
            assert isinstance(next_plan(before, left, wanted, loads, broken=True), plan)
    assert room(Config(), DEEPSEEK_V3, "decode") is None  # a laptop: nobody knows


def _crew(ranks: int) -> list[Member]:
    return [Member(f"a{i}", "attention", f"n{i // 8}", "h:1") for i in range(ranks)]


def _even(wanted: Wanted, holders: int) -> UnitPlan:
    plan = next_plan(None, _crew(holders), wanted, {layer: [1.0] * 256 for layer in wanted.layers})
    assert isinstance(plan, UnitPlan)
    return plan
