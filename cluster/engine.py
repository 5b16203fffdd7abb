"""The engine of one device: requests in, one step at a time, tokens out.

`step()` is the whole story: plan, run the model, sample, commit. It owns the sequences and the
pages; it knows no threads, no network and no text. Whatever goes wrong with one request ends that
request alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rayseek.cluster.grammar import GrammarCompiler
from rayseek.cluster.next_token import TokenChooser
from rayseek.cluster.pages import PagePool
from rayseek.cluster.request import Delta, FinishReason, Request, RequestRefused, Token
from rayseek.cluster.scheduler import Limits, Plan, SequenceView, plan_step
from rayseek.cluster.sequence import Sequence
from rayseek.model.batch import PAGE_TOKENS, Batch

log = logging.getLogger("rayseek.engine")

WAITING_LOOKAHEAD = 8  # queued requests the scheduler looks at in one step
GRAMMAR_PATIENCE_S = 0.005  # an engine with nothing else to do looks at its inbox so often


class Model(Protocol):
    """What the engine needs of a model: logits float32 [R, V] of the batch's out rows."""

    def __call__(self, batch: Batch) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Sizes of one engine. context: most tokens of a sequence, prompt and answer together."""

    num_pages: int
    context: int
    max_queue: int
    step: Limits


@dataclass(frozen=True, slots=True)
class Load:
    """What a dispatcher needs to know to choose a rank."""

    running: int
    waiting: int
    pages_held: int
    pages_total: int
    prompt_tokens_queued: int


class Engine:
    """Continuous batching over one model and one page pool.

    undefined_ids: token ids that have logits but no token; they are never sampled (spec 5.1).
    grammars: without it, requests that carry a grammar are refused.
    """

    def __init__(
        self,
        model: Model,
        limits: EngineLimits,
        undefined_ids: list[int],
        grammars: GrammarCompiler | None = None,
    ) -> None:
        assert limits.num_pages * PAGE_TOKENS >= limits.context, "a context must fit the pages"
        self.model = model
        self.limits = limits
        self.pool = PagePool(limits.num_pages)
        self.chooser = TokenChooser(undefined_ids)
        self._grammars = grammars
        self._compiling: dict[str, Sequence] = {}  # not in the queue until their grammar is there
        self._waiting: dict[str, Sequence] = {}
        self._running: dict[str, Sequence] = {}
        self._arrivals = 0
        self.steps = 0
        self.preemptions = 0

    # ---- requests in ----

    def submit(self, request: Request) -> None:
        """Queue a request. Raises RequestRefused with what to do about it."""
        total = len(request.prompt_ids) + request.sampling.max_tokens
        if not request.prompt_ids:
            raise RequestRefused("the prompt is empty", retryable=False)
        if total > self.limits.context:
            raise RequestRefused(
                f"prompt ({len(request.prompt_ids)} tokens) and max_tokens "
                f"({request.sampling.max_tokens}) exceed the context of {self.limits.context}",
                retryable=False,
            )
        queued = len(self._waiting) + len(self._compiling)
        if queued >= self.limits.max_queue:
            raise RequestRefused(
                f"{queued} requests are queued already, the most this engine keeps "
                "(engine.max_queue); try again later"
            )
        if any(request.id in d for d in (self._compiling, self._waiting, self._running)):
            raise RequestRefused(f"request id {request.id} is in use", retryable=False)
        self._arrivals += 1
        sequence = Sequence.start(request, self._arrivals)
        if not request.grammar:
            self._waiting[request.id] = sequence
        elif self._grammars is None:
            raise RequestRefused("this engine has no grammars", retryable=False)
        else:
            self._grammars.start(request.id, request.grammar, request.emitted_ids)
            self._compiling[request.id] = sequence

    def cancel(self, request_id: str) -> None:
        """Forget a request and free its pages; unknown ids are fine (it may just have ended)."""
        if self._compiling.pop(request_id, None) and self._grammars:
            self._grammars.cancel(request_id)
        self._waiting.pop(request_id, None)
        sequence = self._running.pop(request_id, None)
        if sequence is not None:
            self.pool.release(sequence.pages)

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running or self._compiling)

    @property
    def load(self) -> Load:
        queued = sum(len(s.ids) - s.computed for s in self._waiting.values())
        return Load(
            running=len(self._running),
            waiting=len(self._waiting) + len(self._compiling),
            pages_held=sum(len(s.pages) for s in self._running.values()),
            pages_total=self.pool.num_pages,
            prompt_tokens_queued=queued,
        )

    # ---- one step ----

    @torch.inference_mode()
    def step(self) -> list[Delta]:
        """Run one step for whoever can run; returns what it brought each request."""
        deltas = self._take_compiled() if self._compiling else []
        plan = self._plan()
        self._carry_out(plan)
        rows = [(self._running[key], count) for key, count in plan.chunks]
        if not rows:
            return deltas
        self.steps += 1
        try:
            return deltas + self._forward(rows)
        except Exception:
            log.exception("step %d failed; running its %d sequences alone", self.steps, len(rows))
        # Nothing was committed, and the cache slots are simply written again: find the culprit.
        for row in rows:
            try:
                deltas += self._forward([row])
            except Exception as error:
                log.exception("request %s failed", row[0].request.id)
                deltas.append(self._end(row[0], (), FinishReason.ERROR, repr(error)))
        return deltas

    def _take_compiled(self) -> list[Delta]:
        """Queue the sequences whose grammar is ready; end those whose grammar never will be."""
        assert self._grammars is not None
        idle = not (self._waiting or self._running)
        deltas: list[Delta] = []
        for key, outcome in self._grammars.finished(GRAMMAR_PATIENCE_S if idle else 0):
            sequence = self._compiling.pop(key)
            if isinstance(outcome, str):
                deltas.append(Delta(key, (), FinishReason.ERROR, None, outcome))
            elif outcome.is_stopped():  # it was interrupted after its last token
                deltas.append(Delta(key, (), FinishReason.STOP))
            else:
                sequence.matcher = outcome
                self._waiting[key] = sequence
        return deltas

    def _plan(self) -> Plan:
        running = [
            SequenceView(
                key, s.order, len(s.ids), s.computed, len(s.pages), 0, self.pool.sole_held(s.pages)
            )
            for key, s in self._running.items()
        ]
        waiting = []
        if self._waiting and len(running) < self.limits.step.max_batch:
            first = sorted(self._waiting.values(), key=lambda s: s.order)[:WAITING_LOOKAHEAD]
            for s in first:
                match = self.pool.look_up(s.chain)
                cached = len(match.pages) * PAGE_TOKENS
                waiting.append(
                    SequenceView(
                        s.request.id, s.order, len(s.ids), cached, len(match.pages), match.idle
                    )
                )
        return plan_step(running, waiting, self.pool.available, self.limits.step)

    def _carry_out(self, plan: Plan) -> None:
        """Apply a plan to the pages. All cached prefixes are held before any page is evicted."""
        for key in plan.preempted:
            sequence = self._running.pop(key)
            self.pool.release(sequence.pages)
            sequence.pages, sequence.computed = [], 0
            self._waiting[key] = sequence
            self.preemptions += 1
        for key in plan.admitted:
            sequence = self._running[key] = self._waiting.pop(key)
            sequence.pages = list(self.pool.look_up(sequence.chain).pages)
            self.pool.hold(sequence.pages)
            sequence.computed = len(sequence.pages) * PAGE_TOKENS
            if sequence.cached_tokens is None:
                sequence.cached_tokens = min(sequence.computed, len(sequence.request.prompt_ids))
        for key, count in plan.take:
            self._running[key].pages += self.pool.take(count)

    def _forward(self, rows: list[tuple[Sequence, int]]) -> list[Delta]:
        """Run the model over `count` new rows of each sequence, sample where a prompt is done."""
        batch = Batch.of_sequences(
            [s.ids[s.computed : s.computed + count] for s, count in rows],
            [s.computed for s, _ in rows],
            [s.pages for s, _ in rows],
            [s.computed + count == len(s.ids) for s, count in rows],
        )
        ready = [s for s, count in rows if s.computed + count == len(s.ids)]
        matchers = [s.matcher for s in ready if s.matcher is not None]
        masks = self._grammars.masks(matchers) if self._grammars and matchers else None
        logits_RV = self.model(batch)  # the masks are made meanwhile
        tokens = self.chooser.choose(ready, logits_RV, masks) if ready else []

        # Everything that can fail is behind us: commit.
        for sequence, count in rows:
            sequence.computed += count
            for page in range((sequence.computed - count) // PAGE_TOKENS,
                              sequence.computed // PAGE_TOKENS):  # fmt: skip
                self.pool.publish(sequence.pages[page], sequence.hashes[page])
        return [self._commit(s, token) for s, token in zip(ready, tokens, strict=True)]

    def _commit(self, sequence: Sequence, token: Token | str) -> Delta:
        """Append a sampled token and see whether it was the last."""
        params = sequence.request.sampling
        if isinstance(token, str):
            return self._end(sequence, (), FinishReason.ERROR, token)
        stop = token.id in params.stop_token_ids
        if sequence.matcher is not None and not stop:
            if not sequence.matcher.consume_token(token.id):
                return self._end(sequence, (), FinishReason.ERROR, sequence.grammar_error())
            stop = sequence.matcher.is_stopped()
        sequence.append(token.id)
        if stop or sequence.num_emitted >= params.max_tokens:
            return self._end(sequence, (token,), FinishReason.STOP if stop else FinishReason.LENGTH)
        return Delta(sequence.request.id, (token,), None, sequence.cached_tokens)

    def _end(
        self,
        sequence: Sequence,
        tokens: tuple[Token, ...],
        finish: FinishReason,
        error: str | None = None,
    ) -> Delta:
        del self._running[sequence.request.id]
        if finish is FinishReason.ERROR:
            self.pool.retract(sequence.pages)
        self.pool.release(sequence.pages)
        return Delta(sequence.request.id, tokens, finish, sequence.cached_tokens, error)


def run_to_end(engine: Engine, on_delta: Callable[[Delta], None]) -> None:
    """Step until nothing is left to do; for benchmarks and tests."""
    while engine.busy:
        for delta in engine.step():
            on_delta(delta)
