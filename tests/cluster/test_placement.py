"""Placement of experts: the vendor's check values, and what must hold of every placement."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayseek.cluster.assignment import assign
from rayseek.cluster.eplb import balance, balanced_packing, replicate_experts
from rayseek.cluster.expert_load import ExpertLoad, imbalance, pays
from rayseek.cluster.placement import (
    ExpertPlacement,
    Home,
    Loads,
    holder_loads,
    make_placement,
    settle,
    without,
)

CHECK = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ],
    np.float64,
)


@pytest.mark.parametrize(
    ("groups", "nodes", "slots", "worst"),
    [
        (
            4,
            2,
            [
                [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
                [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
            ],
            [1.208, 1.242],
        ),
        (
            1,
            1,
            [
                [10, 6, 10, 7, 0, 2, 11, 4, 5, 9, 5, 4, 8, 3, 1, 1],
                [1, 10, 2, 4, 5, 11, 5, 0, 6, 7, 6, 3, 8, 8, 9, 7],
            ],
            [1.073, 1.190],
        ),
    ],
)
def test_check_values(groups: int, nodes: int, slots: list[list[int]], worst: list[float]) -> None:
    """Spec section 7.3."""
    found = [balance(load, 16, groups, nodes, 8) for load in CHECK]
    assert [list(f) for f in found] == slots
    placement = ExpertPlacement(0, dict(enumerate(map(tuple, slots))), 2, (0,) * 8)
    loads = holder_loads(placement, dict(enumerate(CHECK.tolist())))
    assert np.round(loads.max(1) / loads.mean(1), 3).tolist() == worst


def test_the_vendors_layouts() -> None:
    """Prefill on 4 nodes keeps groups on nodes; decode on 18 nodes of 8 has two slots a rank."""
    rows = np.random.default_rng(0).lognormal(sigma=0.7, size=(3, 256)).tolist()
    loads = dict(zip(range(3, 6), rows, strict=True))
    nodes = [rank // 8 for rank in range(32)]
    prefill = make_placement(loads, nodes, redundant=32, n_group=8)
    assert prefill.slots_per_holder == 9 and [*prefill.slots] == [3, 4, 5]
    _check_groups(prefill, 8)
    assert imbalance(prefill, loads) < 1.15
    decode = make_placement(loads, [r // 8 for r in range(144)], redundant=32, n_group=8)
    assert decode.slots_per_holder == 2 and len(decode.slots[3]) == 288


def _check_groups(placement: ExpertPlacement, n_group: int) -> None:
    size = placement.experts // n_group
    for slots in placement.slots.values():
        homes: dict[int, set[int]] = {}
        for slot, expert in enumerate(slots):
            homes.setdefault(expert // size, set()).add(placement.nodes[placement.holder_of(slot)])
        assert all(len(nodes) == 1 for nodes in homes.values())


@st.composite
def loads_of(draw: st.DrawFn, experts: int) -> Loads:
    load = st.one_of(st.just(0), st.integers(0, 5), st.integers(0, 10**6))
    row = st.lists(load, min_size=experts, max_size=experts)
    return {layer: draw(row) for layer in draw(st.sampled_from([[1], [3, 4]]))}


Request = tuple[Loads, tuple[int, ...], int, int]  # and nodes of holders, redundant, groups


@st.composite
def requests(draw: st.DrawFn) -> Request:
    n_group = draw(st.sampled_from([1, 2, 4, 8]))
    experts = n_group * draw(st.integers(2, 6))
    if draw(st.booleans()):  # alike nodes, in any order
        per_node, count = draw(st.integers(1, 4)), draw(st.integers(1, 4))
        nodes = draw(st.permutations([n for n in range(count) for _ in range(per_node)]))
    else:
        nodes = draw(st.lists(st.integers(0, 2), min_size=1, max_size=9))
    return draw(loads_of(experts)), tuple(nodes), draw(st.integers(0, 12)), n_group


@settings(max_examples=300)
@given(requests())
def test_laws_of_a_placement(request: Request) -> None:
    loads, nodes, redundant, n_group = request
    placement = make_placement(*request)
    assert placement == make_placement(*request), "the same input gives the same placement"
    experts = len(next(iter(loads.values())))
    holders = range(len(nodes))
    per_holder = placement.slots_per_holder
    wanted = experts + redundant
    assert per_holder == min(experts, -(-wanted // len(nodes)))
    plain = ExpertPlacement(
        0, dict.fromkeys(loads, tuple(s % experts for s in range(per_holder * len(nodes)))),
        per_holder, nodes,
    )  # fmt: skip
    for layer in placement.slots:
        assert {*placement.slots[layer]} == {*range(experts)}
        for holder in holders:
            content = placement.experts_of(holder, layer)
            assert len(content) == len(set(content)) == per_holder, "a second copy here is idle"
        for expert, slots in enumerate(placement.replicas(layer)):
            assert slots == tuple(sorted(slots))
            assert all(placement.slots[layer][s] == expert for s in slots)
    counts = set(Counter(nodes).values())
    pools = len(set(nodes))
    if len(counts) == 1 and n_group % pools == 0 and per_holder <= experts // pools:
        _check_groups(placement, n_group)
    else:
        worst, plain_worst = (holder_loads(p, loads).max(1) for p in (placement, plain))
        assert (worst <= plain_worst * (1 + 1e-12)).all(), "not worse than no balancing"


@settings(max_examples=200)
@given(requests(), st.data())
def test_deaths(request: Request, data: st.DataObject) -> None:
    placement = make_placement(*request)
    holders = range(len(placement.nodes))
    dead = data.draw(st.sets(st.sampled_from(holders)))
    alive = [h for h in holders if h not in dead]
    lost = {
        layer: tuple(
            e for e in range(placement.experts)
            if not any(e in placement.experts_of(h, layer) for h in alive)
        )
        for layer in placement.slots
    }  # fmt: skip
    assert placement.uncovered(alive) == {k: v for k, v in lost.items() if v}
    rest = without(placement, dead)
    assert (rest is None) == any(lost.values())
    if rest is not None:
        assert rest.version == placement.version + 1
        assert rest.nodes == tuple(placement.nodes[h] for h in alive)
        for layer in placement.slots:
            for new, old in enumerate(alive):
                assert rest.experts_of(new, layer) == placement.experts_of(old, layer)
    for layer, experts in placement.single_homed().items():
        for expert in experts:
            (home,) = {placement.holder_of(s) for s in placement.replicas(layer)[expert]}
            assert expert in placement.uncovered([h for h in holders if h != home])[layer]


@settings(max_examples=200)
@given(requests(), st.integers(0, 20), st.integers(0, 3), st.data())
def test_choice_of_replicas(request: Request, index: int, node: int, data: st.DataObject) -> None:
    placement = make_placement(*request)
    holder = data.draw(st.none() | st.sampled_from(range(len(placement.nodes))))
    if holder is not None:
        node = placement.nodes[holder]
    for layer in placement.slots:
        choice = placement.choose(layer, Home(index, node, holder))
        table, count = choice.table, choice.count
        assert table.dtype == count.dtype == np.int32
        for expert, slots in enumerate(placement.replicas(layer)):
            chosen = table[expert, : count[expert]].tolist()
            assert len(set(chosen)) == len(chosen) and set(chosen) <= set(slots)
            homes = [placement.holder_of(s) for s in slots]
            used = [placement.holder_of(s) for s in chosen]
            if holder in homes:
                assert used == [holder]
            elif node in [placement.nodes[h] for h in homes]:
                assert {placement.nodes[h] for h in used} == {node}
            else:
                assert sorted(chosen) == sorted(slots)


def test_tokens_spread_over_replicas() -> None:
    """Many homes with one token each use all replicas, as one home with many tokens does."""
    placement = make_placement({0: [8.0, 1, 1, 1]}, (0, 0, 0, 0), redundant=4)
    slots = placement.replicas(0)[0]
    assert len(slots) > 1
    firsts = Counter(int(placement.choose(0, Home(i)).table[0, 0]) for i in range(12))
    assert set(firsts) == set(slots) and max(firsts.values()) - min(firsts.values()) <= 1


@settings(max_examples=200)
@given(st.data())
def test_settling(data: st.DataObject) -> None:
    """Nothing of a node's contents is changed by it, and no exchange inside a node loads less."""
    experts = data.draw(st.integers(2, 8))
    nodes = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=4))
    old_nodes = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=4))
    layers = data.draw(st.sampled_from([[1], [3, 4]]))
    row = st.lists(st.integers(0, 9), min_size=experts, max_size=experts)
    old, new = (
        make_placement({k: data.draw(row) for k in layers}, where, data.draw(st.integers(0, 4)))
        for where in (old_nodes, nodes)
    )
    shared = min(len(nodes), len(old_nodes))
    stay = data.draw(st.permutations(range(len(old_nodes))))[: data.draw(st.integers(0, shared))]
    became = dict(zip(stay, data.draw(st.permutations(range(len(nodes)))), strict=False))
    was = {new_holder: holder for holder, new_holder in became.items()}
    settled = settle(old, new, became)
    for layer in new.slots:
        for node in set(nodes):
            members = [h for h, n in enumerate(nodes) if n == node]
            contents = [sorted(new.experts_of(h, layer)) for h in members]
            assert sorted(sorted(settled.experts_of(h, layer)) for h in members) == sorted(contents)
            held = [old.experts_of(was[h], layer) if h in was else () for h in members]
            fewest = min(
                sum(len(set(c) - set(h)) for c, h in zip(order, held, strict=True))
                for order in itertools.permutations(contents)
            )
            now = [settled.experts_of(h, layer) for h in members]
            assert sum(len(set(n) - set(h)) for n, h in zip(now, held, strict=True)) == fewest
    for holder, origin in was.items():
        for layer in new.slots:
            before, after = old.experts_of(origin, layer), settled.experts_of(holder, layer)
            for slot, expert in enumerate(before[: new.slots_per_holder]):
                assert expert not in after or after[slot] == expert, "what is kept stays in place"


def test_settling_on_itself_moves_nothing() -> None:
    loads = dict(enumerate(np.random.default_rng(1).random((4, 32)).tolist()))
    placement = make_placement(loads, [r // 4 for r in range(8)], redundant=8, n_group=8)
    assert settle(placement, placement) == placement


@settings(max_examples=100)
@given(st.integers(1, 5).flatmap(lambda n: st.lists(
    st.lists(st.integers(-9, 9), min_size=n, max_size=n), min_size=n, max_size=n)))  # fmt: skip
def test_assignment_is_the_cheapest(cost: list[list[int]]) -> None:
    rows = range(len(cost))
    cheapest = min(sum(cost[r][c] for r, c in enumerate(p)) for p in itertools.permutations(rows))
    choice = assign(np.array(cost, np.float64))
    assert sorted(choice) == list(rows)
    assert sum(cost[r][c] for r, c in enumerate(choice)) == cheapest


def test_the_plain_order_stays_where_balancing_is_no_better() -> None:
    """Among them loads that the greedy packing makes worse."""
    for load in ([1] * 6, [0] * 6, [1, 1, 4, 2, 2, 2]):
        assert make_placement({0: load}, (0, 0)).slots == {0: (0, 1, 2, 3, 4, 5)}
    assert make_placement({0: [9, 9, 9, 1, 1, 1]}, (0, 0)).slots != {0: (0, 1, 2, 3, 4, 5)}


def test_load_counters() -> None:
    placement = make_placement({3: [1.0] * 4, 4: [1.0] * 4}, (0, 0))
    load = ExpertLoad([3, 4], 4, half_life_s=60)
    load.add(placement, 0, np.array([[8, 0], [4, 4]]))
    load.age(60)
    load.add(placement, 1, np.array([[2, 2], [0, 4]]))
    assert load.rows == {3: [4, 0, 2, 2], 4: [2, 2, 0, 4]}
    assert imbalance(placement, load.rows) == pytest.approx((4 + 4) / (4 + 4))
    assert imbalance(placement, {3: [0] * 4, 4: [0] * 4}) == 1
    uneven = {3: [9, 9, 1, 1], 4: [9, 9, 1, 1]}
    better = make_placement(uneven, (0, 0))
    assert imbalance(placement, uneven) == 1.8 and imbalance(better, uneven) == 1
    assert pays(placement, better, uneven, 0.5) and not pays(placement, better, uneven, 0.9)
    assert not pays(better, better, uneven, 0)


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="3 packs"):
        balanced_packing(np.ones(4), 3)
    with pytest.raises(ValueError, match="expected 4 to 8"):
        replicate_experts(np.ones(4), 9, 2)
    with pytest.raises(ValueError, match="on 0 holders"):
        make_placement({0: [1.0] * 4}, ())
    with pytest.raises(ValueError, match="holders slots"):
        balance(np.ones(4), 7, 1, 1, 2)
    with pytest.raises(ValueError, match="same layers"):
        settle(make_placement({3: [1.0] * 4}, (0,)), make_placement({4: [1.0] * 4}, (0,)))
