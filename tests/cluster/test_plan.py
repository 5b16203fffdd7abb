"""The leader's decisions: who takes part, who holds which experts, who is to blame."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rayseek.cluster.agreement import Agreement, Kind, Vote, agree
from rayseek.cluster.plan import (
    Member,
    Pulse,
    UnitPlan,
    Wanted,
    _spans,
    culprits,
    next_look,
    next_plan,
    problems,
    thin_spots,
)

LOADS = {layer: [1.0] * 16 for layer in (1, 2, 3)}


def wanted(attention: int, experts: int, redundant: int = 0) -> Wanted:
    return Wanted(attention, experts, redundant, 16, 4, (1, 2, 3))


def crew(attention: int, experts: int, nodes: int = 1) -> list[Member]:
    members = [Member(f"a{i}", "attention", f"n{i % nodes}", f"h:{i}") for i in range(attention)]
    return members + [Member(f"e{i}", "expert", f"n{i % nodes}", f"h:{i}") for i in range(experts)]


def plan_of(*args: object, **more: object) -> UnitPlan:
    plan = next_plan(*args, **more)  # type: ignore[arg-type]
    assert isinstance(plan, UnitPlan), plan
    return plan


@given(st.integers(1, 4), st.integers(0, 5), st.integers(0, 8), st.integers(1, 2), st.data())
def test_a_plan_covers_every_expert_whoever_is_left(
    attention: int, experts: int, redundant: int, nodes: int, data: st.DataObject
) -> None:
    want = wanted(attention, experts, redundant)
    everybody = crew(attention, experts, nodes)
    plan = plan_of(None, everybody, want, LOADS)
    for _ in range(3):
        present = data.draw(st.lists(st.sampled_from(everybody), unique=True))
        following = next_plan(plan, present, want, LOADS)
        roles = {m.role for m in present}
        if "attention" not in roles or (experts and "expert" not in roles):
            assert isinstance(following, str)
            continue
        assert isinstance(following, UnitPlan)
        assert following.epoch == plan.epoch + 1
        assert set(following.members) <= set(present)
        assert [m.role for m in following.members] == sorted(m.role for m in following.members)
        holders = [following.members[r] for r in following.holders]
        assert {m.role for m in holders} == {"expert" if experts else "attention"}
        assert not following.placement.uncovered(range(len(holders)))
        assert len(following.placement.nodes) == len(holders)
        plan = following


def test_replicas_take_over_without_moving_anything() -> None:
    want = wanted(1, 4, redundant=48)  # every expert on every rank
    before = plan_of(None, crew(1, 4), want, LOADS)
    after = plan_of(before, [m for m in crew(1, 4) if m.name != "e1"], want, LOADS)
    for layer in before.placement.slots:
        kept = [before.placement.experts_of(h, layer) for h in (0, 2, 3)]
        assert [after.placement.experts_of(h, layer) for h in range(3)] == kept


def test_the_same_crew_keeps_its_placement_unless_a_rebalance_is_asked_for() -> None:
    want = wanted(1, 2)
    first = plan_of(None, crew(1, 2), want, LOADS)
    assert plan_of(first, crew(1, 2), want, LOADS).placement is first.placement
    skewed = dict.fromkeys(LOADS, [100.0, 90.0] + [1.0] * 6 + [50.0] * 8)
    spread = plan_of(first, crew(1, 2), want, skewed, rebalance=True).placement
    assert spread.version == first.placement.version + 1
    assert spread.slots != first.placement.slots


def test_spares_wait_until_somebody_is_gone() -> None:
    want = wanted(1, 2)
    plan = plan_of(None, crew(1, 3), want, LOADS)
    assert [m.name for m in plan.members] == ["a0", "e0", "e1"]
    after = plan_of(plan, [m for m in crew(1, 3) if m.name != "e0"], want, LOADS)
    assert [m.name for m in after.members] == ["a0", "e1", "e2"]
    assert after.placement.experts_of(0, 1) == plan.placement.experts_of(1, 1)  # e1 keeps its own


def test_the_first_plan_waits_for_everybody_while_it_is_patient() -> None:
    assert next_plan(None, crew(1, 1), wanted(1, 2), LOADS, complete=True) == (
        "waiting for 1 more ranks"
    )
    assert isinstance(next_plan(None, crew(1, 1), wanted(1, 2), LOADS), UnitPlan)


def test_problems_are_named() -> None:
    want = wanted(2, 3, redundant=8)
    whole = plan_of(None, crew(2, 3), want, LOADS)
    assert problems(whole, crew(2, 3), want) == []
    less = plan_of(whole, crew(1, 2), want, LOADS)
    assert problems(less, crew(1, 2), want) == [
        "1 of 2 attention ranks take part",
        "2 of 3 expert ranks take part",
    ]
    assert "gone, and being replaced: e2" in problems(whole, crew(2, 2), want)
    bare = plan_of(None, crew(2, 3), wanted(2, 3), LOADS)
    assert problems(bare, crew(2, 3), want) == [] == thin_spots(whole, want)
    assert thin_spots(bare, wanted(2, 3)) == []
    assert thin_spots(bare, want) == [
        "14 of 16 experts run on one rank only, not 8; in layer 1: 2-15"
    ]
    assert _spans((0, 1, 2, 5, 7, 8)) == "0-2, 5, 7-8"


votes = st.builds(
    Vote, st.sampled_from(Kind), st.integers(0, 100), st.integers(0, 3), st.booleans()
)


@given(st.lists(votes, min_size=1), st.integers(0, 3))
def test_members_agree_on_what_somebody_wants(voted: list[Vote], epoch: int) -> None:
    agreement = agree(voted, epoch)
    assert agreement.kind == max(v.kind for v in voted)
    alone = [i for i, v in enumerate(voted) if v.alone and v.kind == agreement.kind]
    assert (agreement.alone is None) == (not alone)
    if agreement.alone is not None:
        assert agreement.only(agreement.alone) and agreement.alone == alone[0]
    assert (
        agreement
        == agree(voted, epoch)
        == Agreement(
            agreement.kind,
            tuple(
                v.rows * (v.kind == agreement.kind and i in (alone or [i])[:1])
                for i, v in enumerate(voted)
            ),
            {v.newest_epoch for v in voted} == {max(v.newest_epoch for v in voted)}
            and voted[0].newest_epoch > epoch,
            agreement.alone,
        )
    )


def pulse(**what: object) -> Pulse:
    standing = {"epoch": 1, "passes": 7, "where": "layer 3, dispatch", "waits": False}
    return Pulse(**(standing | {"idle": False, "since_s": 100.0} | what))  # type: ignore[arg-type]


def test_who_stands_still_is_to_blame_and_not_who_waits_for_it() -> None:
    assert culprits({"a": pulse(waits=True), "b": None}, 10).keys() == {"b"}
    assert culprits({"a": pulse(waits=True), "b": pulse()}, 10).keys() == {"b"}
    assert "layer 3" in culprits({"a": pulse(waits=True), "b": pulse()}, 10)["b"]
    assert culprits({"a": pulse(waits=True), "b": pulse(idle=True)}, 10) == {}
    assert culprits({"a": pulse(since_s=9.0)}, 10) == {}


@given(st.lists(st.floats(0, 20)), st.floats(1, 15), st.floats(0.1, 2))
def test_who_stands_still_is_looked_at_within_a_second_of_the_deadline(
    since: list[float], deadline: float, at_most: float
) -> None:
    pulses = {str(i): pulse(since_s=s) for i, s in enumerate(since)}
    waits = next_look(pulses | {"silent": None, "idle": pulse(idle=True)}, deadline, at_most)
    assert 0 < waits <= at_most
    for s in since:
        if s < deadline < s + waits:
            assert s + waits < deadline + 0.5
