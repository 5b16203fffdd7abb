"""The engine of one device: requests in, one step at a time, tokens out.

`step()` is the whole story: plan, run the model, sample, commit, draft. It owns the sequences and
the pages; it knows no threads, no network and no text. Whatever goes wrong with one request ends
that request alone.

A sequence that decodes has a row for its last token and one for each draft of the step before. The
sampler chooses a token for every row; a draft is accepted when it is the token that the row before
it chose. So drafts decide how many tokens a step brings, and never which.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol, TypeAlias

import torch

from rayseek.cluster.drafting import Drafter, DraftModel, Stepped, learned_to
from rayseek.cluster.grammar import GrammarCompiler
from rayseek.cluster.next_token import TokenChooser, masks_at
from rayseek.cluster.pages import PagePool
from rayseek.cluster.request import Delta, FinishReason, Request, RequestRefused, Token
from rayseek.cluster.scheduler import LOOKAHEAD, Limits, Plan, SequenceView, plan_step
from rayseek.cluster.sequence import Sequence
from rayseek.cluster.speculation import DepthPolicy, DraftMeter, choose_depth
from rayseek.cluster.step_clock import IDLE, StepClock, Work
from rayseek.kernels.sampler import Sampler, TorchSampler
from rayseek.model.batch import PAGE_TOKENS, Batch
from rayseek.model.cached_model import Passed
from rayseek.model.latent_cache import LatentCache

log = logging.getLogger("rayseek.engine")

GRAMMAR_PATIENCE_S = 0.005  # of an engine that nobody wakes, when there is nothing else to do


class Model(DraftModel, Protocol):
    """What the engine needs of a model; `model/cached_model.py` says what each pass computes."""

    @property
    def drafts(self) -> bool: ...

    @property
    def cache(self) -> LatentCache: ...

    def forward(self, batch: Batch) -> Passed: ...


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Sizes of one engine. context: most tokens of a sequence, prompt and answer together.

    draft_tokens: most tokens drafted for a sequence in one step; 0: the draft module rests.
    """

    num_pages: int
    context: int
    max_queue: int
    step: Limits
    draft_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Load:
    """What a dispatcher needs to know to choose a rank, and how drafting goes.

    pages_held: of requests that run, and on their way from or to other ranks; a shared one is one.
    drafted, accepted: drafts so far, by how far ahead they were (the first is one token);
    draft_rates: the tokens/s predicted for 0, 1, ... drafts when `draft_depth` was chosen.
    """

    running: int
    waiting: int
    pages_held: int
    pages_total: int
    prompt_tokens_queued: int
    draft_depth: int = 0
    draft_rates: tuple[float, ...] = ()
    drafted: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()
    parked: int = 0  # of the waiting, those whose pages are on their way


class Engine:
    """Continuous batching over one model and one page pool.

    undefined_ids: token ids that have logits but no token; they are never sampled (spec 5.1).
    grammars: without it, requests that carry a grammar are refused.
    depth_policy: how many tokens to draft in a step, of those that the limits allow.
    fingerprint: of the model, told to those who ask this engine (model/fingerprint.py).
    sampler: draws tokens from logits; without one, PyTorch does.
    clock: seconds by which depths of drafts are compared.
    """

    def __init__(
        self,
        model: Model,
        limits: EngineLimits,
        undefined_ids: list[int],
        grammars: GrammarCompiler | None = None,
        depth_policy: DepthPolicy = choose_depth,
        fingerprint: str = "",
        sampler: Sampler | None = None,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        assert limits.num_pages * PAGE_TOKENS >= limits.context, "a context must fit the pages"
        self.model = model
        self.limits = limits
        self.fingerprint = fingerprint
        self.pool = PagePool(limits.num_pages)
        self.chooser = TokenChooser(undefined_ids, sampler or TorchSampler())
        self.meter = DraftMeter(limits.draft_tokens if model.drafts else 0)
        self._depth_policy = depth_policy
        self._grammars = grammars
        self._drafter = Drafter(self.chooser, grammars)
        self._parked: dict[str, Sequence] = {}  # not in the queue until `unpark`
        self._compiling: dict[str, Sequence] = {}  # not in the queue until their grammar is there
        self._waiting: dict[str, Sequence] = {}
        self._running: dict[str, Sequence] = {}
        self._stepped: list[Stepped] = []  # by the step that goes on
        self._arrivals = 0
        self.steps = 0
        self.preemptions = 0
        self._clock, self._now = StepClock(), clock
        self._ended: float | None = None  # when the last step did, if it left anything running

    # ---- requests in ----

    def submit(self, request: Request) -> None:
        """Queue a request. Raises RequestRefused with what to do about it.

        One with max_tokens 0 samples nothing: it ends when the pages before its last token are
        in the prefix cache.
        """
        self._enqueue(self._accept(request))

    def park(self, request: Request) -> Sequence:
        """Take a request, but keep it out of the queue until `unpark`: its pages are on their way.

        Raises RequestRefused, as `submit` does.
        """
        sequence = self._parked[request.id] = self._accept(request)
        return sequence

    def unpark(self, request_id: str) -> None:
        """Queue a parked request, in the order of its arrival."""
        self._enqueue(self._parked.pop(request_id))

    def _accept(self, request: Request) -> Sequence:
        total = len(request.prompt_ids) + request.sampling.max_tokens
        if not request.prompt_ids:
            raise RequestRefused("the prompt is empty", retryable=False)
        if total > self.limits.context:
            raise RequestRefused(
                f"prompt ({len(request.prompt_ids)} tokens) and max_tokens "
                f"({request.sampling.max_tokens}) exceed the context of {self.limits.context}",
                retryable=False,
            )
        queued = len(self._waiting) + len(self._compiling) + len(self._parked)
        if queued >= self.limits.max_queue:
            raise RequestRefused(
                f"{queued} requests are queued already, the most this engine keeps "
                "(engine.max_queue); try again later"
            )
        known = (self._parked, self._compiling, self._waiting, self._running)
        if any(request.id in requests for requests in known):
            raise RequestRefused(f"request id {request.id} is in use", retryable=False)
        if request.grammar and self._grammars is None:
            raise RequestRefused("this engine has no grammars", retryable=False)
        self._arrivals += 1
        return Sequence.start(request, self._arrivals)

    def _enqueue(self, sequence: Sequence) -> None:
        request = sequence.request
        if request.grammar and self._grammars is not None:
            self._grammars.start(request.id, request.grammar, request.emitted_ids)
            self._compiling[request.id] = sequence
        else:
            self._waiting[request.id] = sequence

    def cancel(self, request_id: str) -> None:
        """Forget a request and free its pages; unknown ids are fine (it may just have ended)."""
        if self._compiling.pop(request_id, None) and self._grammars:
            self._grammars.cancel(request_id)
        self._parked.pop(request_id, None)
        self._waiting.pop(request_id, None)
        sequence = self._running.pop(request_id, None)
        if sequence is not None:
            self.pool.release(sequence.pages)

    def wake_by(self, call: Callable[[], None]) -> None:
        """`call`, in some thread, when a step can do something that the last one could not; steps
        no longer wait for a grammar then. Free pages are whoever frees them to tell of."""
        if self._grammars is not None:
            self._grammars.on_ready = call

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running or self._compiling)

    @property
    def load(self) -> Load:
        queued = sum(len(s.ids) - s.computed for s in self._waiting.values())
        return Load(
            running=len(self._running),
            waiting=len(self._waiting) + len(self._compiling) + len(self._parked),
            pages_held=self.pool.num_pages - self.pool.available,
            pages_total=self.pool.num_pages,
            prompt_tokens_queued=queued,
            draft_depth=self.meter.choice.depth,
            draft_rates=self.meter.choice.rates,
            drafted=tuple(self.meter.drafted),
            accepted=tuple(self.meter.accepted),
            parked=len(self._parked),
        )

    @property
    def progress(self) -> tuple[int, ...]:
        """Changes with whatever the next step depends on, but for news from outside."""
        return self.steps, self.preemptions, self.pool.available

    @property
    def work(self) -> Work:
        """What was done so far; any thread may ask."""
        clock = self._clock
        return Work(
            self.steps, self.preemptions, clock.prompt_rows, clock.decode_rows, clock.seconds
        )

    # ---- one step ----

    def step(self) -> list[Delta]:
        """Run one step for whoever can run; returns what it brought each request, in order.

        A request has more than one delta only when the last is an error.
        """
        try:
            self._clock.enter("plan")
            deltas = self._take_compiled() if self._compiling else []
            plan = self._plan()
            self._carry_out(plan)
            if plan.chunks:
                deltas += self._run([(self._running[key], count) for key, count in plan.chunks])
            return deltas
        finally:
            self._clock.enter(IDLE)

    @torch.inference_mode()
    def _run(self, rows: list[tuple[Sequence, int]]) -> list[Delta]:
        """One `forward`, then drafts. rows: sequences with their number of rows, pages taken."""
        decoding = sum(s.computed + count >= len(s.ids) and not s.only_prompt for s, count in rows)
        depth = self.meter.choose(self._depth_policy, decoding)
        self.steps += 1
        deltas: list[Delta] = []
        decode_rows = sum(count for s, count in rows if len(s.ids) - s.computed == 1)
        all_rows = sum(count for _, count in rows)
        self._clock.decode_rows += decode_rows
        self._clock.prompt_rows += all_rows - decode_rows
        try:
            deltas += self._forward(rows, depth)
        except Exception:
            log.exception("step %d failed; running its sequences alone", self.steps)
            # Nothing was committed, and the cache slots are simply written again: find the culprit.
            for row in rows:
                try:
                    deltas += self._forward([row], depth)
                except Exception as error:
                    log.exception("request %s failed", row[0].request.id)
                    deltas.append(self._end(row[0], (), FinishReason.ERROR, repr(error)))
        if not self.meter.most:
            return deltas  # nobody asks how long it took
        stepped, self._stepped = self._stepped, []
        if stepped:
            self._clock.enter("draft")
            try:
                self._drafter.draft(self.model, depth, stepped, self._running)
            except Exception:
                log.exception("no drafts in step %d", self.steps)
                for sequence, _ in rows:
                    sequence.drafts = []
        before, self._ended = self._ended, self._now() if self._running else None
        if before and self._ended and decode_rows:
            self.meter.step_took(self._ended - before, all_rows - decode_rows)
        return deltas

    def _take_compiled(self) -> list[Delta]:
        """Queue the sequences whose grammar is ready; end those whose grammar never will be."""
        assert self._grammars is not None
        patient = self._grammars.on_ready is None and not (self._waiting or self._running)
        deltas: list[Delta] = []
        for key, outcome in self._grammars.finished(GRAMMAR_PATIENCE_S if patient else 0):
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
                key,
                s.order,
                len(s.ids),
                s.computed,
                len(s.pages),
                0,
                self.pool.sole_held(s.pages),
                len(s.drafts),
            )  # fmt: skip
            for key, s in self._running.items()
        ]
        waiting = []
        if self._waiting and len(running) < self.limits.step.max_batch:
            first = sorted(self._waiting.values(), key=lambda s: s.order)[:LOOKAHEAD]
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
            sequence.drafts = []
            self._waiting[key] = sequence
            self.preemptions += 1
        for key in plan.admitted:
            sequence = self._running[key] = self._waiting.pop(key)
            sequence.pages = list(self.pool.look_up(sequence.chain).pages)
            self.pool.hold(sequence.pages)
            sequence.computed = len(sequence.pages) * PAGE_TOKENS
            if sequence.cached_tokens is None:
                sequence.cached_tokens = min(sequence.computed, len(sequence.request.prompt_ids))
                if sequence.cached_before is not None:
                    sequence.cached_tokens = min(sequence.cached_tokens, sequence.cached_before)
        for key, count in plan.take:
            self._running[key].pages += self.pool.take(count)

    def _forward(self, rows: Rows[tuple[Sequence, int]], draft_depth: int) -> list[Delta]:
        """Run the model over new rows, choose tokens where all known ones are computed, commit."""
        starts = [s.computed for s, _ in rows]
        wanted = [  # rows of which tokens are drawn
            0 if s.only_prompt else max(0, s.computed + count - len(s.ids) + 1) for s, count in rows
        ]
        batch = Batch.of_sequences(
            [s.inputs(count) for s, count in rows],
            starts,
            [s.pages for s, _ in rows],
            wanted,
        )
        places = [
            place
            for (s, _), number in zip(rows, wanted, strict=True)
            if number
            for place in s.places(number - 1)
        ]
        masks = masks_at(places, self._grammars)
        self._clock.enter("model")
        passed = self.model.forward(batch)  # the masks are made meanwhile
        self._clock.enter("sample")
        tokens = self.chooser.choose(places, passed.logits_RV, masks) if places else []

        # Everything that can fail is behind us: commit.
        learning = self.meter.most > 0
        deltas: list[Delta] = []
        first_row = first_token = 0
        for (sequence, count), start, own in zip(rows, starts, wanted, strict=True):
            known = len(sequence.ids)
            if own:
                deltas += self._commit(sequence, tokens[first_token : first_token + own])
            else:
                sequence.computed = min(start + count, len(sequence.ids) - 1)
                self._publish(sequence, start)
                if sequence.only_prompt and sequence.computed == len(sequence.ids) - 1:
                    deltas.append(self._end(sequence, (), FinishReason.LENGTH))
            end = start
            if learning and (draft_depth or known - start > 1):
                end = learned_to(known, sequence.computed, draft_depth)
            if end > start:
                assert passed.normed_TD is not None
                hidden_TD = passed.normed_TD[first_row : first_row + end - start]
                self._stepped.append(Stepped(sequence, start, hidden_TD))
            first_row += count
            first_token += own
        return deltas

    def _publish(self, sequence: Sequence, start: int) -> None:
        """Share the pages that became full since `start` tokens were computed."""
        for page in range(start // PAGE_TOKENS, sequence.computed // PAGE_TOKENS):
            self.pool.publish(sequence.pages[page], sequence.hashes[page])

    def _commit(self, sequence: Sequence, chosen: list[Token | str]) -> list[Delta]:
        """Append the first chosen token, and of the others those that follow accepted drafts.

        Drafts that came true are computed already; the last token never is.
        """
        params, key = sequence.request.sampling, sequence.request.id
        start = sequence.computed
        drafts, sequence.drafts = sequence.drafts[: len(chosen) - 1], []
        tokens: list[Token] = []
        finish: FinishReason | None = None
        error: str | None = None
        for number, token in enumerate(chosen):
            if isinstance(token, str):
                finish, error = FinishReason.ERROR, token
                break
            stop = token.id in params.stop_token_ids
            if sequence.matcher is not None and not stop:
                if not sequence.matcher.consume_token(token.id):
                    finish, error = FinishReason.ERROR, sequence.place.grammar_error()
                    break
                stop = sequence.matcher.is_stopped()
            accepted = number < len(drafts) and token.id == drafts[number]
            if drafts:
                rejected = 0 if accepted else len(drafts) - number
                token = Token(token.id, token.logprob, token.top, accepted, rejected)
            sequence.append(token.id)
            tokens.append(token)
            if stop or sequence.num_emitted >= params.max_tokens:
                finish = FinishReason.STOP if stop else FinishReason.LENGTH
            if finish or not accepted:
                break
        if drafts:
            self.meter.verified(len(drafts), sum(token.drafted for token in tokens))
        if finish is FinishReason.ERROR:
            news = [Delta(key, tuple(tokens), None, sequence.cached_tokens)] if tokens else []
            return [*news, self._end(sequence, (), finish, error)]
        sequence.computed = len(sequence.ids) - 1
        self._publish(sequence, start)
        if finish:
            self.meter.answered()
            return [self._end(sequence, tuple(tokens), finish)]
        return [Delta(key, tuple(tokens), None, sequence.cached_tokens)]

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


Command: TypeAlias = Callable[[Engine], None]  # for the thread that owns an engine


def run_to_end(engine: Engine, on_delta: Callable[[Delta], None]) -> None:
    """Step until nothing is left to do; for benchmarks and tests."""
    while engine.busy:
        for delta in engine.step():
            on_delta(delta)
