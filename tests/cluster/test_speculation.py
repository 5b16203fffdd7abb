"""Drafts: how many to make, when they come true, and what is told of them."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rayseek.cluster.engine import Engine, run_to_end
from rayseek.cluster.next_token import edits
from rayseek.cluster.request import Delta, FinishReason, Request, SamplingParams, Token
from rayseek.cluster.sequence import Place, Sequence
from rayseek.cluster.speculation import (
    MARGIN,
    SOON,
    TRY_AGAIN,
    Choice,
    DraftMeter,
    Measured,
    choose_depth,
    estimated_seconds,
    expected_tokens,
)
from rayseek.kernels.sampler import apply_edit
from rayseek.model.batch import Batch

EngineMaker = Callable[..., Engine]


@st.composite
def measurements(draw: st.DrawFn) -> Measured:
    most = draw(st.integers(1, 4))

    def for_each(what: st.SearchStrategy[Any], count: int = most + 1) -> tuple[Any, ...]:
        return tuple(draw(st.lists(what, min_size=count, max_size=count)))

    return Measured(
        for_each(st.floats(0, 1), most),
        for_each(st.floats(1e-4, 1.0) | st.none()),
        (0.0, *for_each(st.floats(0.01, 3.0), most)),
        for_each(st.integers(0, 3 * TRY_AGAIN)),
        for_each(st.integers(0, 9)),
        for_each(st.floats(0, 1.0)),
        draw(st.integers(0, most)),
        draw(st.floats(1, 1000)),
    )


@given(measurements())
def test_a_depth_is_on_trial_or_has_the_best_prospect(measured: Measured) -> None:
    choice = choose_depth(measured)
    times = estimated_seconds(measured.seconds, measured.growth)
    if measured.seconds[0] is None:
        assert choice == Choice(0) and not times, "what drafts cost is beyond this"
        return
    assert all(own in (None, time) for own, time in zip(measured.seconds, times, strict=True))
    tokens = [expected_tokens(measured.acceptance[:d]) for d in range(len(times))]
    steps = [1 + (measured.answer - 1) / t for t in tokens]  # of an answer: the first brings one
    rates = [
        1 / (s * n / measured.answer + p)
        for s, n, p in zip(times, steps, measured.prompts, strict=True)
    ]
    assert choice.rates == pytest.approx(rates)
    lost_once = measured.lost[choice.depth] == 1
    if measured.unused[choice.depth] < (SOON if lost_once else TRY_AGAIN):
        best = max(range(len(rates)), key=lambda d: rates[d])
        assert rates[choice.depth] * MARGIN**2 >= rates[best] * (1 - 1e-9)


NEVER_LOST = (0, 0, 0), (0, 0, 0), (0.0, 0.0, 0.0)


def chosen(
    acceptance: tuple[float, ...],
    seconds: tuple[float | None, ...],
    used: int,
    growth: tuple[float, ...] = (0.0, 0.3, 0.45),
) -> int:
    return choose_depth(Measured(acceptance, seconds, growth, *NEVER_LOST, used)).depth


def test_extremes() -> None:
    sure, never = (1.0, 1.0), (0.0, 0.0)
    flat, steep = (0.010, 0.011, 0.012), (0.010, 0.021, 0.032)
    assert chosen(never, flat, 2) == 0
    assert chosen(sure, flat, 0) == 2
    assert chosen((1.0, 0.0), flat, 0) == 1
    assert chosen(sure, steep, 2) == 0, "a row costs a step of its own"


def test_short_answers_gain_less() -> None:
    """Of three tokens, the first comes with the prompt: two steps instead of three."""
    for answer, expected in ((3.0, 0), (300.0, 2)):
        seconds = (0.010, 0.016, 0.018)
        known = Measured((1.0, 1.0), seconds, (0.0, 1.0, 2.0), *NEVER_LOST, 0, answer)
        assert choose_depth(known).depth == expected


def test_what_is_not_known_is_tried_where_it_could_be_best() -> None:
    sure = (1.0, 1.0)
    assert chosen(sure, (None,) * 3, 2) == 0, "first what a step takes by itself"
    assert chosen(sure, (0.010, None, None), 0) == 2, "hope"
    assert chosen(sure, (0.010, None, None), 0, (0.0, 1.1, 2.2)) == 0, "elsewhere it did not pay"
    assert chosen(sure, (0.010, None, None), 0, (0.0, 0.8, 2.2)) == 1
    assert chosen(sure, (0.010, 0.016, None), 1) == 2, "one more is half as much again"
    assert chosen(sure, (0.010, 0.031, None), 1) == 0
    assert chosen(sure, (0.010, None, 0.040), 2) == 0, "3 for a third of the growth with 2"


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.1, 4.0))
def test_batches_of_another_size_are_asked_first(known: int, now: int, growth: float) -> None:
    """Rows are the less for free the more there are; how much less, the next trial says."""
    meter = DraftMeter(2)
    for batch in [known] * 8 + [now]:
        depth = meter.choose(choose_depth, batch)
        meter.step_took(0.010 * batch * (1 + depth * growth), 0)
    if meter._size_of(known) is not meter._size_of(now):
        longer = 2 * growth * (now / known) ** 0.25  # with 2 drafts, the first and only trial
        assert meter.measured.growth == pytest.approx(
            (0.0, longer * 2 / 3, longer), rel=0.1
        )  # a size stands for some


def test_a_choice_does_not_waver() -> None:
    """Two depths that are predicted to be about as good: whichever is in use, stays."""
    close = (0.010, 0.0195, 0.0290)
    for used in (1, 2):
        assert chosen((1.0, 1.0), close, used) == used


def test_what_costs_more_is_tried_less_often() -> None:
    def trials(seconds: tuple[float, ...]) -> int:
        meter, used = DraftMeter(2), [0, 0, 0]
        for _ in range(20_000):
            depth = meter.choose(choose_depth, 1)
            used[depth] += 1
            meter.step_took(seconds[depth], 0)
            meter.verified(depth, 0)
        assert sum(n * s for n, s in zip(used, seconds, strict=True)) < 1.01 * 20_000 * seconds[0]
        return used[1]

    assert trials((0.010, 0.050, 0.050)) < trials((0.010, 0.0101, 0.0102)) / 2


@given(st.integers(1, 40), st.floats(1e-5, 3e-4))
def test_prompts_between_do_not_hide_what_depths_take(batch: int, row_s: float) -> None:
    """Also where no step with drafts is without them: many short answers."""
    meter, true = DraftMeter(2), (0.010, 0.012, 0.0135)
    for number in range(400):
        depth = meter.choose(choose_depth, batch)
        meter.verified(depth, depth)
        prompt = 10 + number % 20 if depth or number % 2 else 0
        meter.step_took(true[depth] + row_s * prompt, prompt)
    assert meter.choice.depth == 2
    known = [(s * batch, t) for s, t in zip(meter.measured.seconds, true, strict=True) if s]
    assert len(known) >= 2 and all(s == pytest.approx(t, rel=0.05) for s, t in known)


@pytest.mark.parametrize("dearer, expected", [(1.0, 2), (6.0, 0)])
def test_prompts_that_take_longer_beside_drafts_speak_against_them(
    dearer: float, expected: int
) -> None:
    """Every answer of some 15 tokens has a prompt of 30; one draft more makes its rows dearer."""
    meter, true = DraftMeter(2), (0.010, 0.018, 0.025)
    for number in range(3000):
        depth = meter.choose(choose_depth, 8)
        for _ in range(8):
            meter.verified(depth, depth)
        prompt = 30 if number % 2 else 0
        meter.step_took(true[depth] + 1e-4 * prompt * (dearer if depth else 1.0), prompt)
    assert meter.choice.depth == expected


def test_a_useless_draft_is_seldom_tried_and_noticed_when_it_becomes_useful() -> None:
    """Against a machine whose step takes 10 ms, 12 with a draft; some are interrupted."""
    generator = torch.Generator().manual_seed(0)

    def chance(p: float) -> bool:
        return bool(torch.rand(1, generator=generator) < p)

    def simulate(meter: DraftMeter, true: float, steps: int) -> int:
        used = pending = 0
        for _ in range(steps):
            if pending:
                meter.verified(1, int(chance(true)))
            now = meter.choose(choose_depth, 1)
            pause = 0.050 if chance(0.1) else 0.0
            meter.step_took(0.010 + 0.001 * pending + 0.001 * now + pause, 0)
            pending = now
            used += now
        return used

    meter = DraftMeter(1)
    simulate(meter, 0.0, 3000)
    assert simulate(meter, 0.0, 5000) <= 50
    assert simulate(meter, 0.95, 20_000) > 10_000
    assert simulate(meter, 0.95, 5000) > 4900, "it does not waver"


@pytest.mark.parametrize("with_draft, expected", [(0.023, 0), (0.016, 1)])
def test_a_machine_that_changes_its_pace_changes_no_choice(
    with_draft: float, expected: int
) -> None:
    """Others on its cores make all steps longer for some time."""
    meter, used, pace = DraftMeter(1), [0, 0], 1.0
    generator = torch.Generator().manual_seed(2)
    for _ in range(8000):
        if torch.rand(1, generator=generator) < 0.006:
            pace = (1.0, 1.3, 1.7)[int(torch.randint(3, (1,), generator=generator))]
        depth = meter.choose(choose_depth, 1)
        used[depth] += 1
        meter.verified(depth, depth)
        noise = 1 + 0.1 * float(torch.rand(1, generator=generator))
        meter.step_took((0.010, with_draft)[depth] * pace * noise, 0)
    assert used[1 - expected] <= 80


def prompt_of(seed: int, length: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, 300, (length,), generator=generator).tolist())


def one_draft(*_: object) -> Choice:
    return Choice(1)


def deltas_of(engine: Engine, *requests: Request) -> dict[str, list[Delta]]:
    for request in requests:
        engine.submit(request)
    deltas: dict[str, list[Delta]] = defaultdict(list)
    run_to_end(engine, lambda d: deltas[d.request_id].append(d))
    engine.pool.check()
    assert engine.pool.available == engine.pool.num_pages
    return deltas


def tokens_of(deltas: list[Delta]) -> list[Token]:
    return [token for delta in deltas for token in delta.tokens]


DEMANDING = SamplingParams(
    50, temperature=1.0, seed=11, top_k=50, top_p=0.95, frequency_penalty=0.8,
    presence_penalty=0.4, repetition_penalty=1.2, logit_bias=((7, 2.0),), min_tokens=3,
)  # fmt: skip


@pytest.mark.parametrize("grammar", ["", "start: /[a-z ]{300}/"])
@pytest.mark.parametrize("params", [DEMANDING, replace(DEMANDING, temperature=0.0)])
@pytest.mark.parametrize("depth", [1, 3])
def test_a_draft_that_knows_the_targets_logits_always_comes_true(
    make_engine: EngineMaker, grammar: str, params: SamplingParams, depth: int
) -> None:
    """Exact coupling: noise, penalties, filters and grammar are the target's at every depth."""
    engine = make_engine(draft_tokens=depth, policy=lambda *_: Choice(depth), blur=0.0)
    request = Request("r", prompt_of(1, 20), params, grammar=grammar)  # ends at 70: one page edge
    tokens = tokens_of(deltas_of(engine, request)["r"])
    blind = engine.model.blurred  # type: ignore[attr-defined]
    assert sum(engine.meter.accepted) >= sum(engine.meter.drafted) - depth * blind
    assert engine.meter.drafted[0] > 10
    if depth == 1 and not grammar:
        assert engine.steps <= 1 + 50 // 2 + 2 * blind
    assert sum(t.drafted for t in tokens) == sum(engine.meter.accepted)


def test_the_module_itself_sees_the_target_through(make_engine: EngineMaker) -> None:
    """With a bias that leaves the target no choice, the real module's draft has none either."""
    sure = SamplingParams(30, temperature=0.5, seed=3, logit_bias=((42, 100.0),))
    engine = make_engine(draft_tokens=2, policy=lambda *_: Choice(2))
    deltas = deltas_of(engine, Request("r", prompt_of(2, 30), sure))["r"]
    assert [t.id for t in tokens_of(deltas)] == [42] * 30
    assert [len(d.tokens) for d in deltas] == [1] + [3] * 9 + [2]
    assert engine.meter.drafted == engine.meter.accepted == [10, 9]


@pytest.mark.parametrize("blur", [None, 0.0, 0.5])
def test_what_is_told_of_drafts_adds_up(make_engine: EngineMaker, blur: float | None) -> None:
    engine = make_engine(draft_tokens=2, policy=lambda *_: Choice(2), blur=blur)
    requests = [
        Request(f"r{i}", prompt_of(i, 30), SamplingParams(40, seed=i, temperature=0.7))
        for i in range(4)
    ]
    deltas = deltas_of(engine, *requests)
    tokens = [t for d in deltas.values() for t in tokens_of(d)]
    assert sum(t.drafted for t in tokens) == sum(engine.meter.accepted)
    told = sum(t.drafted + t.rejected for t in tokens)
    assert told == sum(engine.meter.drafted), "no request ended before its last draft's turn"
    assert engine.load.drafted == tuple(engine.meter.drafted)


def test_a_stop_in_the_middle_of_accepted_drafts_ends_there(make_engine: EngineMaker) -> None:
    plain = Request("r", prompt_of(5, 10), SamplingParams(30, seed=1, temperature=0.9))
    ids = [t.id for t in tokens_of(deltas_of(make_engine(), plain)["r"])]
    for stop in dict.fromkeys(ids[1:12]):
        params = replace(plain.sampling, stop_token_ids=(stop,))
        engine = make_engine(draft_tokens=3, policy=lambda *_: Choice(3), blur=0.0)
        deltas = deltas_of(engine, replace(plain, sampling=params))["r"]
        assert [t.id for t in tokens_of(deltas)] == ids[: ids.index(stop) + 1]
        assert deltas[-1].finish is FinishReason.STOP


def test_without_drafts_the_module_rests(make_engine: EngineMaker) -> None:
    engine = make_engine(draft_tokens=0, blur=0.0)
    called: list[object] = []  # an exception here would only cost the drafts
    engine.model.draft = lambda *_: called.append(_)  # type: ignore[method-assign]
    engine.model.remember = engine.model.draft  # type: ignore[method-assign]
    deltas_of(engine, Request("r", prompt_of(1, 100), SamplingParams(20)))
    assert not called


class FailingDrafts:
    """A model whose draft module fails at every third pass."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.drafts = inner, inner.drafts
        self.passes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def draft(self, *arguments: Any) -> Any:
        self.passes += 1
        if self.passes % 3 == 0:
            raise RuntimeError("a kernel failed")
        return self.inner.draft(*arguments)


def test_a_failing_draft_module_costs_speed_only(make_engine: EngineMaker) -> None:
    requests = [
        Request(f"r{i}", prompt_of(i, 30), SamplingParams(40, seed=i, temperature=0.7))
        for i in range(3)
    ]
    expected = {k: [t.id for t in tokens_of(d)]
                for k, d in deltas_of(make_engine(), *requests).items()}  # fmt: skip
    engine = make_engine(draft_tokens=2, policy=lambda *_: Choice(2), blur=0.0)
    engine.model = FailingDrafts(engine.model)
    got = {k: [t.id for t in tokens_of(d)] for k, d in deltas_of(engine, *requests).items()}
    assert got == expected
    assert sum(engine.meter.accepted) > 0


@pytest.mark.parametrize("spread", [False, True], ids=["here", "spread"])
def test_rows_that_nobody_drafts_from_cost_no_passes(
    make_engine: EngineMaker, spread: bool
) -> None:
    """The last step of an answer, and a prompt's first pieces, are learned in one call. Where
    experts are spread, each pass is one of the whole unit."""
    engine = make_engine(draft_tokens=2, policy=lambda *_: Choice(2))
    draft, rows = engine.model.draft, list[int]()

    def noting(batch: Batch, hidden_TD: torch.Tensor) -> Any:
        rows.append(len(batch.out_rows_R))
        return draft(batch, hidden_TD)

    engine.model.draft = noting  # type: ignore[method-assign]
    if spread:
        engine.model.drafts_ahead = lambda *_: None  # type: ignore[method-assign]
    deltas_of(engine, Request("r", prompt_of(1, 600), SamplingParams(5, temperature=0.0)))
    assert engine.steps > 3 and all(rows) and bool(rows) == spread


def test_a_cached_prefix_brings_its_drafts_latents(make_engine: EngineMaker) -> None:
    """The module's layer of a shared page is as if the prompt had been computed."""
    fresh, warm = (make_engine(draft_tokens=1, policy=one_draft) for _ in range(2))
    prompt = prompt_of(8, 200)
    deltas_of(warm, Request("first", prompt, SamplingParams(1)))
    request = Request("r", prompt, SamplingParams(30, seed=2))
    (cold_first, *_), (warm_first, *_) = (deltas_of(e, request)["r"] for e in (fresh, warm))
    assert (cold_first.cached_tokens, warm_first.cached_tokens) == (0, 192)
    assert fresh.meter.accepted == warm.meter.accepted
    module = [e.model.cache.layers[-1] for e in (fresh, warm)]  # type: ignore[attr-defined]
    pages = [e.pool.look_up(hashes_of(prompt)).pages for e in (fresh, warm)]
    assert len(pages[0]) == len(pages[1]) == 3
    for one, other in zip(*pages, strict=True):
        assert torch.equal(module[0][one], module[1][other])


def test_the_modules_latents_are_the_same_whatever_was_drafted(make_engine: EngineMaker) -> None:
    """Nothing stays of drafts that fell. A rest leaves gaps, in the answer alone."""
    request = Request("r", prompt_of(4, 64), SamplingParams(120, seed=6, temperature=0.9))
    kept = []
    for depths in ([1], [2], [1, 2, 2, 1], [0, 1, 0, 0, 2]):
        turn = itertools.cycle(depths)
        engine = make_engine(
            draft_tokens=2, blur=0.4, policy=lambda *_, turn=turn: Choice(next(turn))
        )
        ids = [t.id for t in tokens_of(deltas_of(engine, request)["r"])]
        pages = engine.pool.look_up(hashes_of((*request.prompt_ids, *ids))).pages
        assert len(pages) == 2
        kept.append(engine.model.cache.layers[-1][list(pages)])  # type: ignore[attr-defined]
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[0], kept[2])
    assert torch.equal(kept[0][0], kept[3][0]) and not torch.equal(kept[0][1], kept[3][1])


def test_at_rest_the_module_learns_prompts_and_costs_nothing_else(make_engine: EngineMaker) -> None:
    engine = make_engine(draft_tokens=2, policy=lambda *_: Choice(0))
    learned: list[int] = []
    inner = engine.model.remember

    def remember(batch: Batch, hidden_TD: Tensor) -> None:
        learned.extend(batch.positions_T.tolist())
        inner(batch, hidden_TD)

    engine.model.remember = remember  # type: ignore[method-assign]
    called: list[object] = []
    engine.model.draft = lambda *_: called.append(_)  # type: ignore[method-assign]
    engine.model.drafts_ahead = engine.model.draft  # type: ignore[method-assign]
    deltas_of(engine, Request("r", prompt_of(1, 100), SamplingParams(20)))
    assert not called
    assert learned == list(range(64)), "the full page, which may be shared"


def drafts_of(engine: Engine, request: Request) -> tuple[list[tuple[int, ...]], list[int]]:
    """What was drafted after each step, and the tokens."""
    engine.submit(request)
    drafted, ids = [], []
    while engine.busy:
        for delta in engine.step():
            ids += [token.id for token in delta.tokens]
        drafted += [tuple(s.drafts) for s in engine._running.values()]
    return drafted, ids


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(90, seed=3, temperature=0.8),
        SamplingParams(90, temperature=0.0, banned_ids=(5, 6), logit_bias=((9, 3.0),)),
        SamplingParams(90, seed=4, temperature=1.0, top_k=20, top_p=0.9, min_p=0.01),
        SamplingParams(9, seed=5, temperature=0.9, logprobs=3),
        replace(DEMANDING, max_tokens=90),
    ],
)
@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
def test_drafts_at_once_are_those_made_one_by_one(
    make_engine: EngineMaker, params: SamplingParams, kv_dtype: str
) -> None:
    """Over page edges, to the last token that is allowed."""
    request = Request("r", prompt_of(7, 50), params)
    at_once, single = (
        make_engine(draft_tokens=3, policy=lambda *_: Choice(3), kv_dtype=kv_dtype)
        for _ in range(2)
    )
    single.model.drafts_ahead = lambda *_: None  # type: ignore[method-assign]
    found = drafts_of(at_once, request)
    assert found == drafts_of(single, request)
    assert max(map(len, found[0])) == 3


@given(
    st.lists(st.integers(3, 20), min_size=1, max_size=8),
    st.lists(st.integers(3, 20), min_size=1, max_size=4),
    st.tuples(*[st.sampled_from([0.0, 0.7, -1.1])] * 2),
    st.sampled_from([1.0, 1.3, 0.8]),
    st.integers(0, 12),
)
def test_a_place_behind_drafts_is_that_of_a_sequence_which_has_emitted_them(
    emitted: list[int],
    drafts: list[int],
    penalties: tuple[float, float],
    repetition: float,
    min_tokens: int,
) -> None:
    params = SamplingParams(
        50, seed=9, frequency_penalty=penalties[0], presence_penalty=penalties[1],
        repetition_penalty=repetition, min_tokens=min_tokens, stop_token_ids=(1, 4),
        logit_bias=((5, 1.5),),
    )  # fmt: skip
    request = Request("r", (3, 4, 5), params, emitted_ids=tuple(emitted))
    guessing = Sequence.start(request, 0)
    guessing.drafts = drafts
    logits = torch.randn(32, generator=torch.Generator().manual_seed(0))
    places = guessing.places(len(drafts))
    if places[0].decides_nothing:
        assert [place.more for place in places] == [len(drafts)]
    for count, place in enumerate(itertools.accumulate(drafts, Place.then, initial=guessing.place)):
        if not places[0].decides_nothing:
            assert places[count] == place
        sure = Sequence.start(replace(request, emitted_ids=(*emitted, *drafts[:count])), 0).place
        assert place.draw() == sure.draw()
        one, other = logits.clone(), logits.clone()
        for changed, where in ((one, place), (other, sure)):
            for edit in edits(where):
                apply_edit(changed, edit)
        assert torch.equal(one, other)


def hashes_of(ids: tuple[int, ...]) -> list[bytes]:
    return Sequence.start(Request("x", ids, SamplingParams(1)), 0).hashes
