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

from rayseek.cluster.pages import PagePool
from rayseek.cluster.request import Delta, FinishReason, Request, RequestRefused, Token
from rayseek.cluster.scheduler import Limits, Plan, SequenceView, plan_step
from rayseek.cluster.sequence import Sequence
from rayseek.kernels.sample import sample, top_logprobs
from rayseek.model.batch import PAGE_TOKENS, Batch

log = logging.getLogger("rayseek.engine")

WAITING_LOOKAHEAD = 8  # queued requests the scheduler looks at in one step
MASKS_KEPT = 16  # masks of banned ids; an API needs two or three


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
    """

    def __init__(self, model: Model, limits: EngineLimits, undefined_ids: list[int]) -> None:
        assert limits.num_pages * PAGE_TOKENS >= limits.context, "a context must fit the pages"
        self.model = model
        self.limits = limits
        self.pool = PagePool(limits.num_pages)
        self._undefined = torch.tensor(undefined_ids, dtype=torch.int64)
        self._masks: dict[tuple[int, ...], Tensor] = {}  # by banned ids
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
        if len(self._waiting) >= self.limits.max_queue:
            raise RequestRefused(
                f"{len(self._waiting)} requests are queued already, the most this engine keeps "
                "(engine.max_queue); try again later"
            )
        if request.id in self._waiting or request.id in self._running:
            raise RequestRefused(f"request id {request.id} is in use", retryable=False)
        self._arrivals += 1
        self._waiting[request.id] = Sequence.start(request, self._arrivals)

    def cancel(self, request_id: str) -> None:
        """Forget a request and free its pages; unknown ids are fine (it may just have ended)."""
        self._waiting.pop(request_id, None)
        sequence = self._running.pop(request_id, None)
        if sequence is not None:
            self.pool.release(sequence.pages)

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def load(self) -> Load:
        queued = sum(len(s.ids) - s.computed for s in self._waiting.values())
        return Load(
            running=len(self._running),
            waiting=len(self._waiting),
            pages_held=sum(len(s.pages) for s in self._running.values()),
            pages_total=self.pool.num_pages,
            prompt_tokens_queued=queued,
        )

    # ---- one step ----

    @torch.inference_mode()
    def step(self) -> list[Delta]:
        """Run one step for whoever can run; returns what it brought each request."""
        plan = self._plan()
        self._carry_out(plan)
        rows = [(self._running[key], count) for key, count in plan.chunks]
        if not rows:
            return []
        self.steps += 1
        try:
            return self._forward(rows)
        except Exception:
            log.exception("step %d failed; running its %d sequences alone", self.steps, len(rows))
        # Nothing was committed, and the cache slots are simply written again: find the culprit.
        deltas: list[Delta] = []
        for row in rows:
            try:
                deltas += self._forward([row])
            except Exception as error:
                log.exception("request %s failed", row[0].request.id)
                deltas.append(self._end(row[0], (), FinishReason.ERROR, repr(error)))
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
        logits_RV = self.model(batch)
        ready = [s for s, count in rows if s.computed + count == len(s.ids)]
        tokens = self._sample(ready, logits_RV) if ready else []

        # Everything that can fail is behind us: commit.
        for sequence, count in rows:
            sequence.computed += count
            for page in range((sequence.computed - count) // PAGE_TOKENS,
                              sequence.computed // PAGE_TOKENS):  # fmt: skip
                self.pool.publish(sequence.pages[page], sequence.hashes[page])
        return [self._commit(s, token) for s, token in zip(ready, tokens, strict=True)]

    def _sample(self, ready: list[Sequence], logits_RV: Tensor) -> list[Token | None]:
        """One token per row of logits; None where the row has no finite logits."""
        finite = torch.isfinite(logits_RV.sum(dim=1)).tolist()
        raw = {
            r: logits_RV[r].clone()
            for r, s in enumerate(ready)
            if s.request.sampling.logprobs is not None
        }
        for r, sequence in enumerate(ready):
            adjust_logits(logits_RV[r], sequence)
        banned = [s.request.sampling.banned_ids for s in ready]
        masks = {ids: self._mask(ids, logits_RV.shape[1]) for ids in set(banned)}
        shared = len(masks) == 1  # by all rows, as almost always
        logits_RV += masks[banned[0]] if shared else torch.stack([masks[b] for b in banned])
        ids = sample(logits_RV, [s.draw() for s in ready])
        tokens: list[Token | None] = []
        for r, (sequence, token) in enumerate(zip(ready, ids, strict=True)):
            if not finite[r]:
                tokens.append(None)
            elif r in raw:
                logprob, top = top_logprobs(raw[r], token, sequence.request.sampling.logprobs or 0)
                tokens.append(Token(token, logprob, tuple(top)))
            else:
                tokens.append(Token(token))
        return tokens

    def _mask(self, banned: tuple[int, ...], vocab: int) -> Tensor:
        """float32 [V]: -inf where an id has no token or is banned, else 0. Kept, for few differ."""
        mask_V = self._masks.get(banned)
        if mask_V is None:
            mask_V = torch.zeros(vocab)
            mask_V[self._undefined] = -torch.inf
            mask_V[list(banned)] = -torch.inf
            if len(self._masks) >= MASKS_KEPT:
                self._masks.clear()
            self._masks[banned] = mask_V
        return mask_V

    def _commit(self, sequence: Sequence, token: Token | None) -> Delta:
        """Append a sampled token and see whether it was the last."""
        params = sequence.request.sampling
        if token is None:
            return self._end(sequence, (), FinishReason.ERROR, "the model's logits are not finite")
        stop = token.id in params.stop_token_ids
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


def adjust_logits(logits_V: Tensor, sequence: Sequence) -> None:
    """Penalties, then logit bias, then stop tokens barred before min_tokens (spec 6.1), in place.

    Frequency and presence count emitted tokens; repetition also counts the prompt.
    """
    p = sequence.request.sampling
    if p.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(sequence.ids)), dtype=torch.int64)
        values = logits_V[seen]
        logits_V[seen] = torch.where(
            values > 0, values / p.repetition_penalty, values * p.repetition_penalty
        )
    if sequence.counts and (p.frequency_penalty or p.presence_penalty):
        ids = torch.tensor(list(sequence.counts), dtype=torch.int64)
        counts = torch.tensor(list(sequence.counts.values()), dtype=torch.float32)
        logits_V[ids] -= counts * p.frequency_penalty + p.presence_penalty
    if p.logit_bias:
        ids = torch.tensor([i for i, _ in p.logit_bias], dtype=torch.int64)
        logits_V[ids] += torch.tensor([bias for _, bias in p.logit_bias])
    if sequence.num_emitted < p.min_tokens and p.stop_token_ids:
        logits_V[torch.tensor(p.stop_token_ids, dtype=torch.int64)] = -torch.inf


def run_to_end(engine: Engine, on_delta: Callable[[Delta], None]) -> None:
    """Step until nothing is left to do; for benchmarks and tests."""
    while engine.busy:
        for delta in engine.step():
            on_delta(delta)
