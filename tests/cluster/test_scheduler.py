"""The scheduler's guarantees, over arbitrary states."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from rayseek.cluster.scheduler import Limits, Plan, SequenceView, plan_step
from rayseek.model.batch import PAGE_TOKENS


@st.composite
def states(draw: st.DrawFn) -> tuple[list[SequenceView], list[SequenceView], int, Limits]:
    """Running sequences hold pages for what is computed (all of a prompt's), waiting ones none."""
    orders = draw(
        st.lists(st.tuples(st.integers(-1, 1), st.integers(0, 99)), unique=True, max_size=12)
    )
    running, waiting = [], []
    for number, order in enumerate(orders):
        length = draw(st.integers(1, 400))
        key = f"s{number}"
        if draw(st.booleans()):
            remaining = draw(st.one_of(st.just(1), st.integers(1, length)))
            pages = -(-length // PAGE_TOKENS)
            if remaining == 1:  # the new token's page may still be missing
                pages = -(-(length - draw(st.integers(0, 1))) // PAGE_TOKENS)
            sole = draw(st.integers(0, pages))
            drafts = draw(st.integers(0, 3)) if remaining == 1 else 0
            running.append(
                SequenceView(key, order, length, length - remaining, pages, 0, sole, drafts)
            )
        else:
            cached = draw(st.integers(0, (length - 1) // PAGE_TOKENS))
            idle = draw(st.integers(0, cached))
            waiting.append(SequenceView(key, order, length, cached * PAGE_TOKENS, cached, idle))
    limits = Limits(
        max_batch=draw(st.integers(max(1, len(running)), 16)),
        step_tokens=draw(st.integers(64, 512)),
        chunk_tokens=draw(st.integers(1, 64)),
    )
    return running, waiting, draw(st.integers(0, 12)), limits


@given(states())
def test_guarantees(
    state: tuple[list[SequenceView], list[SequenceView], int, Limits],
) -> None:
    running, waiting, available, limits = state
    plan = plan_step(running, waiting, available, limits)
    views = {s.key: s for s in running + waiting}
    rows = dict(plan.chunks)
    assert len(rows) == len(plan.chunks), "a sequence has one chunk at most"

    # Pages: never more than there are, and enough for every planned row.
    freed = sum(views[key].sole_pages for key in plan.preempted)
    revived = sum(views[key].idle_pages for key in plan.admitted)
    assert sum(n for _, n in plan.take) + revived <= available + freed
    taken = dict(plan.take)
    for key, count in plan.chunks:
        s = views[key]
        assert 1 <= count <= s.remaining + s.drafts
        assert (s.pages + taken.get(key, 0)) * PAGE_TOKENS >= s.computed + count

    # Decoding never waits, and nobody is preempted who goes before someone that runs on.
    gone = set(plan.preempted)
    alive = [s for s in running if s.key not in gone]
    for s in alive:
        if s.remaining == 1:
            assert rows[s.key] >= 1
    if gone and alive:
        assert max(s.order for s in alive) < min(views[key].order for key in gone)

    # Prompt rows keep to the budget; the batch keeps to its size.
    decoding = [s for s in alive if s.remaining == 1]
    budget = limits.chunk_tokens if decoding else limits.step_tokens
    assert sum(rows.values()) - sum(rows[s.key] for s in decoding) <= budget
    assert len(alive) + len(plan.admitted) <= limits.max_batch

    # Admission is in order: nobody waiting goes before somebody admitted.
    left = [s for s in waiting if s.key not in plan.admitted]
    if left and plan.admitted:
        assert max(views[key].order for key in plan.admitted) < min(s.order for s in left)
    if gone:
        assert not plan.admitted, "what preemption freed is for decoding"


@given(states())
def test_nobody_gives_way_to_a_draft(
    state: tuple[list[SequenceView], list[SequenceView], int, Limits],
) -> None:
    running, waiting, available, limits = state
    plan = plan_step(running, waiting, available, limits)
    undrafted = [replace(s, drafts=0) for s in running]
    without = plan_step(undrafted, waiting, available, limits)
    assert plan.preempted == without.preempted
    assert {key for key, _ in without.chunks} - set(without.admitted) <= dict(plan.chunks).keys()
    if plan.take == without.take and not plan.preempted:  # all drafts fit pages held already
        for s in running:
            if s.drafts and s.computed + 1 + s.drafts <= s.pages * PAGE_TOKENS:
                assert dict(plan.chunks)[s.key] == 1 + s.drafts


@given(states())
def test_something_runs_whenever_something_can(
    state: tuple[list[SequenceView], list[SequenceView], int, Limits],
) -> None:
    running, waiting, available, limits = state
    plan = plan_step(running, waiting, available, limits)
    first = min(waiting, key=lambda s: s.order, default=None)
    fits = first is not None and first.new_pages(first.length) + first.idle_pages <= available
    if not running and fits:
        assert plan.chunks
    if running:
        assert plan.chunks or plan.preempted


def test_a_long_prompt_does_not_stop_decoding() -> None:
    """Eight sequences decode while a prompt of 10,000 tokens is computed in chunks beside them."""
    limits = Limits(max_batch=16, step_tokens=1024, chunk_tokens=100)
    decoding = [SequenceView(f"d{i}", (0, i), 65, 64, 2) for i in range(8)]
    prompt = SequenceView("p", (0, 99), 10_000, 0, 0)
    plan = plan_step(decoding, [prompt], 200, limits)
    steps = 0
    while True:
        assert {f"d{i}" for i in range(8)} <= dict(plan.chunks).keys()
        assert dict(plan.chunks)["p"] <= 100
        done = prompt.computed + dict(plan.chunks)["p"]
        prompt = replace(prompt, computed=done, pages=157)
        steps += 1
        if prompt.remaining == 0:
            break
        plan = plan_step([*decoding, prompt], [], 0, limits)
    assert steps == 100


def test_nothing_to_do() -> None:
    assert plan_step([], [], 10, Limits(4, 64, 64)) == Plan()
