"""The law of same tokens at scale: whole units against engines that run one request at a time.

A few requests in the suite; `pytest --full` runs as many as are promised, and says of what kinds
they were. `--seed N` makes other ones.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest

from rayseek.cluster.build import engine_limits
from rayseek.cluster.dispatch import Dispatcher
from rayseek.cluster.engine import Engine, run_to_end
from rayseek.cluster.request import Request, SamplingParams
from rayseek.kernels.kv_format import KVDtype
from rayseek.model.config import ModelConfig
from tests.cluster.company import (
    SETTINGS,
    Answers,
    Company,
    answer,
    chosen,
    dispatcher,
    is_idle,
    unit,
)
from tests.cluster.test_engine import EOS, GRAMMARS

EngineMaker = Callable[..., Engine]
CALM = SETTINGS.model_copy(update={"step_timeout_s": 30, "max_batch": 32})


def some_requests(random: Random, count: int, grammars: bool = False) -> list[Request]:
    """Prompts of up to six pages, many of which begin alike, and every way of choosing tokens."""
    beginnings = [[random.randrange(3, 1500) for _ in range(300)] for _ in range(3)]
    pick = random.choice
    made = []
    for i in range(count):
        own = [random.randrange(3, 1500) for _ in range(random.randrange(1, 90))]
        params = SamplingParams(
            max_tokens=random.randrange(1, 41),
            temperature=pick([0.0, 0.3, 0.8, 1.3]),
            top_k=pick([0, 0, 5, 50]),
            top_p=pick([1.0, 1.0, 0.9]),
            min_p=pick([0.0, 0.0, 0.05]),
            frequency_penalty=pick([0.0, 0.0, 0.6, 1.5]),
            presence_penalty=pick([0.0, 0.0, 0.8]),
            repetition_penalty=pick([1.0, 1.0, 1.2]),
            logit_bias=pick([(), (), some_ids(random, 9.0), some_ids(random, 99.0)]),
            seed=random.getrandbits(64),
            stop_token_ids=pick([(), (EOS, 17, 200)]),
            min_tokens=random.randrange(4),
            logprobs=pick([None, None, 0, 2]),
        )
        made.append(
            Request(
                f"r{i}",
                (*pick(beginnings)[: pick([0, 0, 63, 64, 130, 200, 300])], *own),
                params,
                cache_salt=pick(["", "", "salt"]),
                priority=random.randrange(-1, 2),
                grammar=pick(["", *GRAMMARS]) if grammars else "",
            )
        )
    return made


def some_ids(random: Random, most: float) -> tuple[tuple[int, float], ...]:
    """Biased, and with a large `most` nearly all the choice there is: then drafts come true."""
    return tuple((i, random.uniform(0.1, 1) * most) for i in random.sample(range(3, 1500), 6))


def one_at_a_time(make_engine: EngineMaker, requests: list[Request]) -> Answers:
    """Each in an engine of its own: no batch, no chunks, no cache, no drafts, no exchange."""
    found: Answers = {}
    for request in requests:
        engine, tokens = make_engine(), found.setdefault(request.id, [])
        engine.submit(request)
        run_to_end(engine, lambda d, tokens=tokens: tokens.extend(map(chosen, d.tokens)))  # type: ignore[misc]
        assert engine._grammars is not None
        engine._grammars.close()
    return found


def differences(found: Answers, expected: Answers) -> list[str]:
    """One line for each request that has other tokens than it should."""
    assert found.keys() == expected.keys()
    lines = []
    for name, tokens in found.items():
        if tokens != (right := expected[name]):
            pairs = zip(tokens, right, strict=False)
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(tokens), len(right)))
            lines.append(f"{name}: {tokens[at : at + 1]} at {at}, {right[at : at + 1]} alone")
    return lines


# ---- the layouts of a unit, one by one ----

LAYOUTS: list[dict[str, Any]] = [
    {"attention": 1},
    {"attention": 2},
    {"attention": 4},
    {"attention": 4, "redundant": 8},
    {"experts": 1},
    {"experts": 2, "micro_batches": 2},
    {"experts": 3, "mode": "exact"},
    {"experts": 3, "redundant": 8},
    {"experts": 5, "attention": 2, "mode": "fixed"},
    {"experts": 2, "prefill": {}},
    {"experts": 3, "redundant": 8, "prefill": {"attention": 2}},
    {"experts": 2, "redundant": 2, "rebalance": True},
    {"attention": 2, "redundant": 4, "rebalance": True, "prefill": {}},
]


@pytest.fixture(scope="module")
def of_all_layouts(make_engine: EngineMaker, pytestconfig: pytest.Config) -> Any:
    random = Random(pytestconfig.getoption("--seed"))
    requests = some_requests(random, 200 if pytestconfig.getoption("--full") else 8)
    return requests, one_at_a_time(make_engine, requests)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
async def test_the_tokens_do_not_depend_on_the_layout(
    tiny_path: Path, of_all_layouts: tuple[list[Request], Answers], layout: dict[str, Any]
) -> None:
    requests, expected = of_all_layouts
    shape = {k: v for k, v in layout.items() if k not in ("prefill", "rebalance")}
    async with contextlib.AsyncExitStack() as stack:
        company = await stack.enter_async_context(unit(tiny_path, settings=CALM, **shape))
        prefill = None
        if "prefill" in layout:
            source = unit(tiny_path, settings=CALM, **layout["prefill"])
            prefill = await stack.enter_async_context(source)
        to = await stack.enter_async_context(dispatcher(company, prefill))
        asked = asyncio.gather(*(answer(to, request) for request in requests))
        if "rebalance" in layout:
            await rebalance(company)
        found = dict(zip([r.id for r in requests], await asked, strict=True))
        assert not differences(found, expected)
        if prefill is not None:
            assert sum(rank.transferred_pages for rank in company.ranks)


# ---- everything at once, at random ----


@dataclass(frozen=True)
class Case:
    """One arrangement. pages: of a rank; experts 0: colocated; drafts None: as measured.

    trouble: what happens while the requests run.
    """

    max_batch: int
    chunk: int
    step: int
    pages: int
    drafts: int | None
    attention: int
    experts: int
    redundant: int
    micro_batches: int
    mode: str
    split: bool
    warm: bool
    grammars: bool
    kv_dtype: KVDtype
    trouble: str

    @staticmethod
    def random(random: Random) -> Case:
        pick = random.choice
        attention, experts = pick([(1, 0), (2, 0), (1, 1), (1, 2), (1, 3), (2, 2), (2, 3)])
        chunk, split = pick([16, 48, 100, 512]), pick([False, True])
        troubles = ["nothing", "attention"]
        troubles += ["expert"] * (experts > 0) + ["prefill"] * split
        troubles += ["rebalance"] * (attention + experts > 1)
        holders = experts or attention
        return Case(
            max_batch=pick([1, 3, 8, 32]),
            chunk=chunk,
            step=max(chunk, pick([16, 256, 1024])),
            pages=pick([10, 24, 300]),
            drafts=pick([0, 1, 2, None]),
            attention=attention,
            experts=experts,
            redundant=pick([0, 4]) if holders > 1 else 0,
            micro_batches=pick([1, 2]),
            mode=pick(["auto", "exact", "fixed"]),
            split=split,
            warm=pick([False, True]),
            grammars=pick([False, True]),
            kv_dtype=pick(["auto", "fp8"]),
            trouble=pick(troubles),
        )


@dataclass
class Tally:
    """What the cases had in them."""

    kinds: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)

    def add(self, case: Case, requests: int, **seen: int) -> None:
        self.kinds.update({f"{f.name} {getattr(case, f.name)}": requests for f in fields(case)})
        self.seen.update(seen | {"cases": 1, "requests": requests})

    def __str__(self) -> str:
        lines = [", ".join(f"{count} {name}" for name, count in self.seen.items())]
        for name in (f.name for f in fields(Case)):
            found = sorted((k, n) for k, n in self.kinds.items() if k.startswith(f"{name} "))
            lines.append(f"{name}: " + ", ".join(f"{k.split()[1]} x {n}" for k, n in found))
        return "\n".join(lines)


@pytest.fixture(scope="module")
def tally(pytestconfig: pytest.Config) -> Iterator[Tally]:
    tally = Tally()
    yield tally
    if pytestconfig.getoption("--full"):
        capture = pytestconfig.pluginmanager.get_plugin("capturemanager")
        assert capture is not None
        with capture.global_and_fixture_disabled():
            print(f"\n{tally}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "number" in metafunc.fixturenames:
        first = 1000 * metafunc.config.getoption("--seed")
        full = metafunc.config.getoption("--full")
        metafunc.parametrize("number", range(first, first + (80 if full else 2)))


async def test_the_tokens_depend_on_nothing_but_the_request(
    tiny_path: Path, make_engine: EngineMaker, tally: Tally, number: int
) -> None:
    random = Random(number)
    case = Case.random(random)
    requests = some_requests(random, 40 if case.max_batch > 8 else 24, case.grammars)
    expected = one_at_a_time(partial(make_engine, kv_dtype=case.kv_dtype), requests)
    async with contextlib.AsyncExitStack() as stack:
        company, prefill = await arranged(stack, tiny_path, case)
        to = await stack.enter_async_context(dispatcher(company, prefill))
        if case.warm:
            prompts = [replace(r, sampling=SamplingParams(max_tokens=1)) for r in requests]
            await asyncio.gather(*(answer(to, replace(r, grammar="")) for r in prompts))
        trouble = asyncio.ensure_future(make_trouble(case, random, company, prefill))
        passers_by = [
            asyncio.ensure_future(pass_by(to, replace(r, id=f"p{r.id}"), random.randrange(30)))
            for r in random.sample(requests, 4)
        ]
        asked = [late_answer(to, r, random.uniform(0, 0.3)) for r in requests]
        async with asyncio.timeout(600):  # of a busy machine
            tokens = await asyncio.gather(*asked)
            await asyncio.gather(*passers_by)
            guessing = await trouble
        found = dict(zip([r.id for r in requests], tokens, strict=True))
        assert not differences(found, expected), case
        units = [company] if prefill is None else [company, prefill]
        for rank in [rank for of in units for rank in of.ranks]:
            async with asyncio.timeout(120):
                while not await asyncio.to_thread(is_idle, rank.server):
                    await asyncio.sleep(0.02)
        engines = [rank.engine for of in units for rank in of.all_ranks]
        drafted, accepted = (
            sum(sum(getattr(e.meter, what)) for e in engines) for what in ("drafted", "accepted")
        )
        tally.add(
            case,
            len(requests),
            tokens=sum(map(len, tokens)),
            accepted_drafts=accepted,
            rewound_drafts=drafted - accepted,
            preemptions=sum(e.preemptions for e in engines),
            kills=case.trouble in ("attention", "expert", "prefill"),
            kills_with_drafts_open=guessing,
            moved_requests=to.moved,
            transferred_pages=sum(rank.transferred_pages for rank in company.all_ranks),
        )


async def arranged(
    stack: contextlib.AsyncExitStack, path: Path, case: Case
) -> tuple[Company, Company | None]:
    """The unit, and one that prefills for it if there is to be one."""
    config = ModelConfig.from_pretrained(path)
    settings = CALM.model_copy(
        update={
            "max_batch": case.max_batch, "chunk_tokens": case.chunk, "step_tokens": case.step,
            "draft_tokens": 2 if case.drafts is None else case.drafts, "kv_dtype": case.kv_dtype,
        }
    )  # fmt: skip
    of_a_page = settings.cache_gib / engine_limits(config, settings).num_pages
    settings = settings.model_copy(update={"cache_gib": of_a_page * (case.pages + 0.5)})
    made = partial(
        unit, path, settings=settings, drafts=case.drafts,
        micro_batches=case.micro_batches, mode=case.mode,
    )  # fmt: skip
    decode = made(case.attention, case.experts, redundant=case.redundant)
    company = await stack.enter_async_context(decode)
    return company, await stack.enter_async_context(made()) if case.split else None


async def make_trouble(
    case: Case, random: Random, company: Company, prefill: Company | None
) -> bool:
    """Returns whether an attention rank was killed while drafts of it waited for their turn."""
    await asyncio.sleep(random.uniform(0.05, 0.4))
    if case.trouble == "rebalance":
        await rebalance(company)
    elif case.trouble == "expert":
        await company.kill("expert", random)
        await company.hire()
    elif case.trouble in ("attention", "prefill"):
        victims = company if case.trouble == "attention" else prefill
        assert victims is not None
        guessing = any(
            sequence.drafts
            for rank in victims.ranks
            for sequence in list(rank.engine._running.values())
        )
        await victims.kill("attention", random)
        return guessing
    return False


async def rebalance(company: Company) -> None:
    """As if load had come to the experts so that the last are the busiest."""
    await asyncio.sleep(0.2)
    plan = company._plans.plan
    if plan is not None:
        for layer in plan.placement.slots:
            company._load._rows[layer][:] = range(8)
        await company.rebalance()


async def late_answer(to: Dispatcher, request: Request, after_s: float) -> list[object]:
    await asyncio.sleep(after_s)
    return await answer(to, request)


async def pass_by(to: Dispatcher, request: Request, tokens: int) -> None:
    """Ask, and leave after so many tokens."""
    async with contextlib.aclosing(to.generate(request)) as deltas:
        async for delta in deltas:
            tokens -= len(delta.tokens)
            if tokens <= 0:
                return
