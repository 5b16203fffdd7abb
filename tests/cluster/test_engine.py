"""The engine's laws on a real (tiny) model: same tokens whatever happens around a request."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rayseek.cluster.engine import Engine, run_to_end
from rayseek.cluster.request import Delta, FinishReason, Request, RequestRefused, SamplingParams
from rayseek.cluster.scheduler import Limits
from rayseek.cluster.speculation import Choice
from rayseek.model.batch import PAGE_TOKENS, Batch
from rayseek.model.cached_model import Passed

EngineMaker = Callable[..., Engine]
FEW = settings(max_examples=settings.default.max_examples // 4)  # 25; 500 with profile "long"
EOS = 1


GRAMMARS = (
    'start: j\nj: %json {"type": "object"}',
    "start: /[a-c]+(xy|yz)*/",
    "start: WORDS? calls\nWORDS: /(.|\\n)+/\n"
    'calls: "{" a "}"\na: %json {"enum": [[1, "two"], null]}',
)


def prompt_of(seed: int, length: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, 300, (length,), generator=generator).tolist())


def sampling(**changes: Any) -> SamplingParams:
    return replace(SamplingParams(max_tokens=12, temperature=0.8, seed=5), **changes)


@st.composite
def drafting(draw: st.DrawFn) -> dict[str, Any]:
    """An engine's arguments: no drafts; real ones; foreseen ones, of which many come true."""
    most = draw(st.integers(0, 3))
    if not most:
        return {}
    depths = draw(st.lists(st.integers(0, most), min_size=1, max_size=7))  # as load may have it
    turn = itertools.cycle(depths)
    blur = draw(st.sampled_from([None, 0.0, 0.3]))
    return {
        "draft_tokens": most, "blur": blur, "policy": lambda *_: Choice(next(turn)),
    }  # fmt: skip


@st.composite
def requests(draw: st.DrawFn) -> list[Request]:
    """Up to seven requests, several of which share the beginning of their prompt."""
    found = []
    for number in range(draw(st.integers(1, 7))):
        shared = prompt_of(draw(st.integers(0, 1)), draw(st.sampled_from([0, 63, 64, 130, 200])))
        own = prompt_of(100 + number, draw(st.integers(1, 70)))
        params = sampling(
            max_tokens=draw(st.integers(1, 40)),
            temperature=draw(st.sampled_from([0.0, 0.3, 1.3])),
            seed=draw(st.integers(0, 2**64 - 1)),
            top_k=draw(st.sampled_from([0, 0, 5])),
            top_p=draw(st.sampled_from([1.0, 1.0, 0.9])),
            frequency_penalty=draw(st.sampled_from([0.0, 0.0, 1.5])),
            repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.2])),
            logprobs=draw(st.sampled_from([None, None, 2])),
            stop_token_ids=draw(st.sampled_from([(), (EOS, 17, 200)])),
            min_tokens=draw(st.integers(0, 3)),
        )
        priority = draw(st.integers(-1, 1))
        salt = draw(st.sampled_from(["", "", "salt"]))
        grammar = draw(st.sampled_from(["", "", *GRAMMARS]))
        found.append(Request(f"r{number}", shared + own, params, salt, priority, grammar=grammar))
    return found


def collect(engine: Engine) -> dict[str, list[Delta]]:
    deltas: dict[str, list[Delta]] = defaultdict(list)
    run_to_end(engine, lambda d: deltas[d.request_id].append(d))
    engine.pool.check()
    assert engine.pool.available == engine.pool.num_pages, "every page came back"
    return deltas


def tokens_of(deltas: list[Delta]) -> list[tuple[int, float | None, Any]]:
    return [(t.id, t.logprob, t.top) for d in deltas for t in d.tokens]


def alone(
    make_engine: EngineMaker, request: Request, **engine_arguments: Any
) -> list[tuple[int, float | None, Any]]:
    engine = make_engine(**engine_arguments)
    engine.submit(request)
    return tokens_of(collect(engine)[request.id])


@FEW
@given(
    requests(),
    st.integers(1, 8),
    st.integers(1, 300),
    st.integers(8, 40),
    st.booleans(),
    drafting(),
    st.data(),
)
def test_same_tokens_whatever_the_batch_the_chunks_the_cache_the_drafts_and_preemption(
    make_engine: EngineMaker,
    batch: list[Request],
    max_batch: int,
    step_tokens: int,
    pages: int,
    warm: bool,
    drafts: dict[str, Any],
    data: st.DataObject,
) -> None:
    """Law 2, bit for bit: tokens and logprobs equal those of the request alone, undrafted."""
    expected = {r.id: alone(make_engine, r) for r in batch}
    limits = Limits(max_batch, step_tokens, data.draw(st.integers(1, step_tokens)))
    engine = make_engine(pages=pages, context=8 * PAGE_TOKENS, step=limits, **drafts)
    if warm:
        for r in batch:
            engine.submit(r)
        collect(engine)
    got: dict[str, list[Delta]] = defaultdict(list)
    left = list(batch)
    while left or engine.busy:  # requests arrive while others run
        if left and (not engine.busy or data.draw(st.booleans())):
            engine.submit(left.pop())
        for delta in engine.step():
            got[delta.request_id].append(delta)
        engine.pool.check()
    for r in batch:
        assert tokens_of(got[r.id]) == expected[r.id]
        assert [d.finish is not None for d in got[r.id]].count(True) == 1


@FEW
@given(requests(), drafting(), st.data())
def test_same_tokens_after_a_restart_in_the_middle(
    make_engine: EngineMaker, batch: list[Request], drafts: dict[str, Any], data: st.DataObject
) -> None:
    """A request continued elsewhere after k tokens gets exactly the tokens that were missing."""
    for request in batch[:3]:
        whole = alone(make_engine, request)
        k = data.draw(st.integers(0, len(whole) - 1))
        moved = replace(request, emitted_ids=tuple(t[0] for t in whole[:k]))
        rest = alone(make_engine, moved, **drafts)
        assert rest == whole[k:]


class CountingModel:
    """Notes which positions of which token chains were really computed."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.drafts = inner.drafts
        self.rows = 0

    def forward(self, batch: Batch) -> Passed:
        self.rows += len(batch.ids_T)
        result: Passed = self.inner.forward(batch)
        return result

    def draft(self, batch: Batch, hidden_TD: Tensor) -> Passed:
        result: Passed = self.inner.draft(batch, hidden_TD)
        return result

    def remember(self, batch: Batch, hidden_TD: Tensor) -> None:
        self.inner.remember(batch, hidden_TD)


@FEW
@given(st.integers(1, 300), st.integers(0, 300), st.booleans())
def test_cached_tokens_are_those_that_prefill_skipped(
    make_engine: EngineMaker, length: int, common: int, same_salt: bool
) -> None:
    """Law 4."""
    engine = make_engine()
    counting = CountingModel(engine.model)
    engine.model = counting
    first = prompt_of(1, length)
    second = first[:common] + prompt_of(2, length - min(common, length) + 1)
    engine.submit(Request("a", first, sampling(max_tokens=1)))
    collect(engine)
    counting.rows = 0
    salt = "" if same_salt else "other"
    engine.submit(Request("b", second, sampling(max_tokens=1), cache_salt=salt))
    (delta,) = collect(engine)["b"]
    assert delta.cached_tokens == len(second) - counting.rows
    assert delta.cached_tokens % PAGE_TOKENS == 0
    if not same_salt:
        assert delta.cached_tokens == 0
    elif common >= PAGE_TOKENS and length > common:
        assert delta.cached_tokens >= common // PAGE_TOKENS * PAGE_TOKENS


def test_preemption_happens_and_changes_nothing(make_engine: EngineMaker) -> None:
    wanted = [Request(f"r{i}", prompt_of(i, 60), sampling(max_tokens=100)) for i in range(4)]
    expected = {r.id: alone(make_engine, r) for r in wanted}
    engine = make_engine(pages=8, context=6 * PAGE_TOKENS)
    for r in wanted:
        engine.submit(r)
    got = collect(engine)
    assert engine.preemptions > 0
    assert {k: tokens_of(v) for k, v in got.items()} == expected


def test_a_shared_page_is_held_once(make_engine: EngineMaker) -> None:
    """Else many answers to one long prompt look like a full rank, and call for another."""
    engine = make_engine()
    shared = prompt_of(1, 3 * PAGE_TOKENS)
    engine.submit(Request("first", (*shared, 7), sampling(max_tokens=30)))
    engine.step()
    for i in range(4):
        engine.submit(Request(f"r{i}", (*shared, 7), sampling(max_tokens=30)))
    engine.step()
    assert engine.load.running == 5
    assert engine.load.pages_held == 3 + 5


def test_undefined_ids_are_never_sampled(make_engine: EngineMaker) -> None:
    engine = make_engine()
    undefined = set(engine.chooser.undefined.tolist())
    assert undefined, "the tiny model has ids without a token"
    bias = tuple((i, 100.0) for i in sorted(undefined))
    engine.submit(Request("r", (5, 6), sampling(temperature=1.3, max_tokens=50, logit_bias=bias)))
    assert not {t for t, _, _ in tokens_of(collect(engine)["r"])} & undefined


def test_banned_ids_are_never_sampled_and_ban_nobody_else(make_engine: EngineMaker) -> None:
    free = Request("free", (5, 6), sampling(temperature=1.3, max_tokens=30))
    plain = alone(make_engine, free)
    banned = tuple(sorted({t for t, _, _ in plain}))
    bias = tuple((i, 100.0) for i in banned)
    barred = sampling(temperature=1.3, max_tokens=30, banned_ids=banned, logit_bias=bias)
    engine = make_engine()
    engine.submit(free)
    engine.submit(Request("barred", (5, 6), barred))
    got = collect(engine)
    assert tokens_of(got["free"]) == plain
    assert not {t for t, _, _ in tokens_of(got["barred"])} & set(banned)


def test_stop_tokens_end_and_min_tokens_delays_them(make_engine: EngineMaker) -> None:
    plain = [t for t, _, _ in alone(make_engine, Request("r", (5, 6), sampling(max_tokens=20)))]
    stop = plain[3]
    first = plain.index(stop)
    stopped = Request("r", (5, 6), sampling(max_tokens=20, stop_token_ids=(stop,)))
    engine = make_engine()
    engine.submit(stopped)
    deltas = collect(engine)["r"]
    assert [t for t, _, _ in tokens_of(deltas)] == plain[: first + 1]
    assert deltas[-1].finish is FinishReason.STOP
    late = replace(stopped, sampling=replace(stopped.sampling, min_tokens=first + 2))
    assert stop not in [t for t, _, _ in alone(make_engine, late)][: first + 2]


def test_length_ends(make_engine: EngineMaker) -> None:
    engine = make_engine()
    engine.submit(Request("r", (5,), sampling(max_tokens=3)))
    deltas = collect(engine)["r"]
    assert len(tokens_of(deltas)) == 3
    assert deltas[-1].finish is FinishReason.LENGTH


def test_cancel_frees_pages_at_any_moment(make_engine: EngineMaker) -> None:
    for steps in range(4):
        engine = make_engine(step=Limits(2, 64, 64))
        for name in "abc":
            engine.submit(Request(name, prompt_of(1, 150), sampling(max_tokens=5)))
        for _ in range(steps):
            engine.step()
        for name in "abcd":
            engine.cancel(name)
        assert not engine.busy
        assert engine.pool.available == engine.pool.num_pages


def test_what_cannot_run_is_refused_with_the_reason(make_engine: EngineMaker) -> None:
    engine = make_engine(context=128, max_queue=1)
    for bad, reason in [((), "empty"), (prompt_of(1, 120), "exceed the context of 128")]:
        with pytest.raises(RequestRefused, match=reason) as refused:
            engine.submit(Request("x", bad, sampling()))
        assert not refused.value.retryable
    engine.submit(Request("a", (5,), sampling()))
    with pytest.raises(RequestRefused, match="max_queue") as refused:
        engine.submit(Request("b", (5,), sampling()))
    assert refused.value.retryable


class FaultyModel(CountingModel):
    """Raises, or returns NaN, whenever token 299 is in the batch."""

    def __init__(self, inner: Any, how: str) -> None:
        super().__init__(inner)
        self.how = how

    def forward(self, batch: Batch) -> Passed:
        bad = (batch.ids_T == 299).nonzero().flatten()
        if len(bad) and self.how == "raise":
            raise RuntimeError("a kernel failed")
        passed: Passed = self.inner.forward(batch)
        sequences = set(batch.sequence_T[bad].tolist())
        for row, out in enumerate(batch.out_rows_R.tolist()):
            if int(batch.sequence_T[out]) in sequences:
                passed.logits_RV[row] = torch.nan
        return passed


@pytest.mark.parametrize("how", ["raise", "nan"])
def test_one_bad_request_ends_alone(make_engine: EngineMaker, how: str) -> None:
    """Law 6, in the engine: others in the same step go on, with unchanged tokens."""
    good = [Request(f"g{i}", prompt_of(i, 20)[:-1] + (3,), sampling()) for i in range(3)]
    good = [replace(r, prompt_ids=tuple(4 if t == 299 else t for t in r.prompt_ids)) for r in good]
    expected = {r.id: alone(make_engine, r) for r in good}
    bad = Request("bad", (*prompt_of(9, 70)[:64], 299, 3), sampling())
    engine = make_engine()
    engine.model = FaultyModel(engine.model, how)
    for r in [good[0], bad, *good[1:]]:
        engine.submit(r)
    got = collect(engine)
    assert got["bad"][-1].finish is FinishReason.ERROR
    assert got["bad"][-1].error
    for r in good:
        if not any(t == 299 for t, _, _ in expected[r.id]):
            assert tokens_of(got[r.id]) == expected[r.id]
    assert not engine.pool.look_up(bad_chain(bad)).pages, "its pages are not offered to others"


def bad_chain(request: Request) -> list[bytes]:
    from rayseek.cluster.sequence import Sequence

    return Sequence.start(request, 0).hashes
