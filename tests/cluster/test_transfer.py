"""Pages handed over between engines: the bytes, their checksums, and the same tokens as ever."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rayseek.cluster.engine import Engine, run_to_end
from rayseek.cluster.request import Delta, FinishReason, Request, RequestRefused, SamplingParams
from rayseek.cluster.speculation import Choice
from rayseek.model.batch import PAGE_TOKENS
from rayseek.model.latent_cache import checksums

EngineMaker = Callable[..., Engine]
FEW = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
PARAMS = SamplingParams(max_tokens=12, temperature=0.8, seed=3)
PROMPT_ONLY = SamplingParams(max_tokens=0)


def prompt_of(seed: int, length: int) -> tuple[int, ...]:
    random = Random(seed)
    return tuple(random.randrange(3, 300) for _ in range(length))


def collect(engine: Engine) -> list[Delta]:
    found: list[Delta] = []
    run_to_end(engine, found.append)
    return found


@FEW
@given(st.integers(2, 400), st.integers(0, 5), st.sampled_from([0, 2]))
def test_a_request_without_tokens_fills_the_prefix_cache(
    make_engine: EngineMaker, length: int, cached: int, drafts: int
) -> None:
    """max_tokens 0: every full page before the last token, nothing sampled, nothing held."""
    engine = make_engine(draft_tokens=drafts, policy=lambda *_: Choice(drafts))
    ids = prompt_of(1, length)
    if cached:
        engine.submit(Request("before", ids[: min(cached * 64 + 1, length)], PROMPT_ONLY))
        collect(engine)
    engine.submit(Request("r", ids, PROMPT_ONLY))
    (delta,) = collect(engine)
    assert delta.finish is FinishReason.LENGTH and not delta.tokens
    assert delta.cached_tokens == min(cached, (length - 1) // 64) * 64
    assert engine.load.pages_held == 0
    engine.pool.check()
    engine.submit(Request("after", ids, PARAMS))
    assert collect(engine)[0].cached_tokens == (length - 1) // 64 * 64


def copy_prefix(source: Engine, target: Engine, request: Request) -> None:
    """What a hand-over does, in one go."""
    sequence = target.park(request)
    match = source.pool.look_up(sequence.chain)
    assert len(match.pages) == len(sequence.chain)
    pages = target.pool.take(len(match.pages))
    target.model.cache.write_pages(pages, source.model.cache.read_pages(match.pages))
    for page, address in zip(pages, sequence.chain, strict=True):
        target.pool.publish(page, address)
    target.pool.release(pages)
    target.unpark(request.id)


@FEW
@given(st.integers(65, 400), st.sampled_from([0, 2]), st.floats(0, 1.5))
def test_copied_pages_give_the_same_tokens(
    make_engine: EngineMaker, length: int, drafts: int, temperature: float
) -> None:
    def engine() -> Engine:
        return make_engine(draft_tokens=drafts, policy=lambda *_: Choice(drafts))

    sampling = replace(PARAMS, temperature=temperature, logprobs=1)
    request = Request("r", prompt_of(length, length), sampling)
    alone, source, target = engine(), engine(), engine()
    alone.submit(request)
    expected = [(t.id, t.logprob) for delta in collect(alone) for t in delta.tokens]
    source.submit(replace(request, sampling=PROMPT_ONLY))
    collect(source)
    copy_prefix(source, target, request)
    deltas = collect(target)
    assert [(t.id, t.logprob) for delta in deltas for t in delta.tokens] == expected
    assert deltas[0].cached_tokens == (length - 1) // PAGE_TOKENS * PAGE_TOKENS


def test_a_parked_request_counts_and_can_be_cancelled(make_engine: EngineMaker) -> None:
    engine = make_engine(max_queue=1)
    engine.park(Request("r", prompt_of(1, 70), PARAMS))
    assert not engine.busy and engine.load.waiting == 1
    with pytest.raises(RequestRefused, match="queued already"):
        engine.submit(Request("s", prompt_of(1, 70), PARAMS))
    engine.cancel("r")
    assert engine.load.waiting == 0
    with pytest.raises(RequestRefused, match="no grammars"):
        engine._grammars = None
        engine.park(Request("g", prompt_of(1, 70), PARAMS, grammar="start: /a/"))


@FEW
@given(st.integers(0, 2**31), st.integers(0, 31), st.data())
def test_a_flipped_bit_changes_the_checksum(seed: int, bit: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, (3, 50), generator=generator).int()
    before = checksums(words)
    assert checksums(words[1:2]) == before[1:2]
    row, column = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 49))
    flip = 1 << bit if bit < 31 else -(2**31)
    words[row, column] ^= flip
    after = checksums(words)
    assert [a == b for a, b in zip(before, after, strict=True)] == [r != row for r in range(3)]
