"""A unit in virtual time: real plans (`plan_step`) of ranks that step together, and a step's price.

What a step would do to each of hundreds of decoding sequences is not computed but known
beforehand: when it takes another page and when it ends are dates in a calendar. So a rank is
planned only when it has prompts, or not enough pages, and then its decoding sequences stand in for
each other: one of them in the plan, a smaller batch limit for the others (tests compare with the
whole plan). Only a rank that may have to preempt is planned with every sequence.
"""

from __future__ import annotations

import heapq
import math
from bisect import insort
from collections.abc import Iterator
from typing import Any

import numpy as np

from rayseek.cluster.scheduler import LOOKAHEAD, Limits, SequenceView, plan_step
from rayseek.cluster.step_times import StepTimes, StepWork
from rayseek.kernels.kv_format import PAGE_TOKENS

MOST_ALIKE = 32  # steps that are taken at once: contexts grow meanwhile
STAND_IN = SequenceView("", (-1, 0), 1, 0, 1)  # a sequence that decodes and needs no page
NEVER = 2**60
_ROUNDING = 1e-9


class Job:
    """A sequence on a rank. known: tokens before the next one; left: to make, 0 for a prompt only.

    cached: of the known ones, whole pages of which are there already. owner: whose it is.
    """

    __slots__ = (
        "began", "cached", "computed", "date", "ends", "key", "known", "left", "number", "owner",
        "pages", "rank", "rows",
    )  # fmt: skip

    def __init__(self, number: int, known: int, left: int, cached: int, owner: Any) -> None:
        self.number, self.key, self.owner = number, str(number), owner
        self.known, self.left, self.cached = known, left, cached
        self.rank = self.computed = self.pages = self.rows = 0
        self.began = self.ends = NEVER  # the steps that make its first token and its last
        self.date = NEVER  # of its entry in the calendar; older ones are void

    def __lt__(self, other: Job) -> bool:
        return self.number < other.number


class SimulatedUnit:
    """`add` jobs; then `begin` a step, let its time pass, and `end` it.

    pages: of each rank. kept: tokens that a step brings a sequence, in the mean.
    """

    def __init__(
        self, ranks: int, limits: Limits, pages: int, kept: float, times: StepTimes
    ) -> None:
        self.ranks, self.limits, self.pages, self.kept = ranks, limits, pages, kept
        self._times = times
        self._limits = [
            Limits(limits.max_batch - max(0, n - 1), limits.step_tokens, limits.chunk_tokens)
            for n in range(limits.max_batch + 1)
        ]
        self._waiting: list[list[Job]] = [[] for _ in range(ranks)]
        self._prompts: list[list[Job]] = [[] for _ in range(ranks)]
        self._decoding: list[dict[str, Job]] = [{} for _ in range(ranks)]
        self._active: set[int] = set()  # ranks with prompts, computed or waiting
        self._calendar: dict[int, list[Job]] = {}
        self._dates: list[int] = []  # of the calendar, a heap
        self._ending: list[Job] = []  # with the step that goes on
        self._short: set[int] = set()  # ranks that preempt in it: they admit nobody
        self._context = 0.0  # sum over the decoding sequences
        self._step, self._steps = 0, 1  # number of the step that comes or goes on, and of how many
        # Of each rank: as the dispatcher hears of them.
        self.used = np.zeros(ranks, np.int64)
        self.queued = np.zeros(ranks, np.int64)
        self.tokens_queued = np.zeros(ranks, np.int64)
        self.batch = np.zeros(ranks, np.int64)
        # Totals so far.
        self.steps = self.prompt_rows = self.preemptions = 0
        self.step_s = self.busy_s = self.tokens = 0.0  # busy: ranks that have rows, in the mean
        self.limited: dict[str, float] = {}  # seconds, by what limited the steps
        self.held_up: dict[str, int] = {}  # plans that left prompts waiting, by why

    @property
    def running(self) -> int:
        return int(self.batch.sum()) + sum(map(len, self._prompts))

    def jobs(self) -> Iterator[Job]:
        """All that are here, with what they have so far: `known` and `left` are brought up to
        date, as for a rank that dies."""
        for rank in range(self.ranks):
            for job in self._decoding[rank].values():
                self._stop(job)
                yield job
            yield from self._prompts[rank]
            yield from self._waiting[rank]

    def add(self, job: Job, rank: int) -> None:
        job.rank = rank
        insort(self._waiting[rank], job)
        self._active.add(rank)
        self.queued[rank] += 1
        self.tokens_queued[rank] += job.known - job.cached

    def begin(self, now: float, until: float) -> float:
        """When the next step ends; several alike, if nothing happens before `until`. math.inf:
        there is nothing to compute."""
        if not self._active and not self.batch.any():
            return math.inf
        self._ending = self._take_pages()
        rows = seen = most = 0
        busy = np.count_nonzero(self.batch)
        for rank in sorted(self._active):
            of_rank = 0
            for job in self._plan(rank):
                of_rank += job.rows
                seen += job.rows * (2 * job.computed + job.rows)
            most, rows = max(most, of_rank), rows + of_rank
            busy += of_rank > 0 and not self.batch[rank]
        batch = int(self.batch.max())
        decoding = int(self.batch.sum())
        context = self._context / decoding if decoding else 0.0
        seconds, limit = self._times.of(
            StepWork(batch, context, most, rows / self.ranks, seen / rows / 2 if rows else 0.0)
        )
        self._steps = 1
        if not rows and not self._ending:
            free = int((until - now) / seconds) + 1 if until < math.inf else MOST_ALIKE
            date = self._dates[0] - self._step if self._dates else MOST_ALIKE
            self._steps = max(1, min(free, date, MOST_ALIKE))
        seconds *= self._steps
        self.prompt_rows += rows
        self.step_s += seconds
        self.busy_s += seconds * busy / self.ranks
        self.steps += self._steps
        self.limited[limit] = self.limited.get(limit, 0.0) + seconds
        return now + seconds

    def end(self) -> tuple[list[Job], list[Job]]:
        """Jobs whose prompt is computed (and first token made, if they make any), and jobs that
        are done."""
        self._step += self._steps
        made = self._steps * self.kept * int(self.batch.sum())
        self._context += made
        self.tokens += made
        begun, done = [], self._ending
        for job in done:
            self._leave(job)
        for rank in list(self._active):
            prompts = self._prompts[rank]
            for job in prompts:
                job.computed += job.rows
                job.rows = 0
            ready = [job for job in prompts if job.computed == job.known]
            if ready:
                self._prompts[rank] = [job for job in prompts if job.computed < job.known]
            for job in ready:
                begun.append(job)
                if job.left > 1:
                    self._decode(job)
                else:
                    self.used[rank] -= job.pages
                    done.append(job)
                self.tokens += min(1, job.left)
            if not self._prompts[rank] and not self._waiting[rank]:
                self._active.discard(rank)
        self._ending = []
        return begun, done

    # ---- decoding, by the calendar ----

    def _decode(self, job: Job) -> None:
        job.began = self._step - 1
        job.ends = job.began + math.ceil((job.left - 1) / self.kept - _ROUNDING)
        self._decoding[job.rank][job.key] = job
        self.batch[job.rank] += 1
        self._context += job.known + 1
        self._enter(job, self._step)

    def _enter(self, job: Job, earliest: int) -> None:
        """Into the calendar: its last step, or the next before which it needs a page."""
        room = job.pages * PAGE_TOKENS - job.known
        full = job.began + 1 + max(0, math.ceil(room / self.kept - _ROUNDING))
        job.date = date = max(earliest, min(full, job.ends))
        if date not in self._calendar:
            self._calendar[date] = []
            heapq.heappush(self._dates, date)
        self._calendar[date].append(job)

    def _length(self, job: Job) -> int:
        """Tokens known before the step that comes."""
        made = 1 + int((self._step - 1 - job.began) * self.kept + _ROUNDING)
        return job.known + min(made, job.left)

    def _leave(self, job: Job) -> None:
        del self._decoding[job.rank][job.key]
        self.batch[job.rank] -= 1
        self.used[job.rank] -= job.pages
        self._context -= job.known + 1 + (self._step - 1 - job.began) * self.kept
        if not self.batch.any():
            self._context = 0.0

    def _stop(self, job: Job) -> None:
        """It goes on later, or elsewhere: what it made so far becomes known."""
        made = self._length(job) - job.known
        job.known, job.left = job.known + made, job.left - made
        job.cached = job.computed = job.pages = 0
        job.began = job.ends = job.date = NEVER

    def _take_pages(self) -> list[Job]:
        """Pages for those who need one in this step; returns those whose last step it is."""
        self._short.clear()
        if not self._dates or self._dates[0] > self._step:
            return []
        heapq.heappop(self._dates)
        due = [job for job in self._calendar.pop(self._step) if job.date == self._step]
        needs: dict[int, int] = {}
        for job in due:
            need = max(0, -(-self._length(job) // PAGE_TOKENS) - job.pages)
            if need:
                needs[job.rank] = needs.get(job.rank, 0) + need
                job.rows = need
        for rank, need in needs.items():
            if need > self.pages - int(self.used[rank]):
                self._make_room(rank)
        ending = []
        for job in due:
            if job.ends == NEVER:  # preempted
                continue
            if job.rows:
                job.pages += job.rows
                self.used[job.rank] += job.rows
            job.rows = 0
            if job.ends == self._step:
                ending.append(job)
            else:
                self._enter(job, self._step + 1)
        return ending

    def _make_room(self, rank: int) -> None:
        """Preempt as the real plan of all sequences says."""
        self._short.add(rank)
        decoding, prompts = self._decoding[rank], self._prompts[rank]
        views = []
        for job in decoding.values():
            length = self._length(job)
            views.append(
                SequenceView(job.key, (0, job.number), length, length - 1, job.pages, 0, job.pages)
            )
        views += [_view(job) for job in prompts]
        plan = plan_step(views, [], self.pages - int(self.used[rank]), self.limits)
        by_key = {**decoding, **{job.key: job for job in prompts}}
        for key in plan.preempted:
            job = by_key[key]
            self.preemptions += 1
            if key in decoding:
                self._leave(job)
                self._stop(job)
            else:
                prompts.remove(job)
                self.used[rank] -= job.pages
                job.cached = job.computed = job.pages = job.rows = 0
            self.add(job, rank)

    # ---- prompts, by real plans ----

    def _plan(self, rank: int) -> list[Job]:
        """Plan the rank's prompts; returns the jobs that have rows in this step."""
        waiting = [] if rank in self._short else self._waiting[rank][:LOOKAHEAD]
        running = [STAND_IN] if self.batch[rank] else []
        running += [_view(job) for job in self._prompts[rank]]
        views = [
            SequenceView(
                job.key, (0, job.number), job.known, _cached(job), _cached(job) // PAGE_TOKENS,
                _cached(job) // PAGE_TOKENS,
            )
            for job in waiting
        ]  # fmt: skip
        decoding = min(int(self.batch[rank]), self.limits.max_batch)
        available = self.pages - int(self.used[rank])
        plan = plan_step(running, views, available, self._limits[decoding])
        prompts = self._prompts[rank]
        for job in waiting[: len(plan.admitted)]:  # strictly in order
            job.computed = _cached(job)
            job.pages = job.computed // PAGE_TOKENS
            self.used[rank] += job.pages
            self.queued[rank] -= 1
            self.tokens_queued[rank] -= job.known - job.cached
            prompts.append(job)
        if plan.admitted:
            del self._waiting[rank][: len(plan.admitted)]
        jobs = {job.key: job for job in prompts}
        for key, count in plan.take:
            jobs[key].pages += count
            self.used[rank] += count
        for key, rows in plan.chunks:
            if key:
                jobs[key].rows = rows
        if len(plan.admitted) < len(waiting):
            self._note(rank, jobs)
        return [job for job in prompts if job.rows]

    def _note(self, rank: int, jobs: dict[str, Job]) -> None:
        """Why prompts wait on."""
        decoding = int(self.batch[rank])
        budget = self.limits.chunk_tokens if decoding else self.limits.step_tokens
        if sum(job.rows for job in jobs.values()) >= budget:
            why = "chunk_tokens" if decoding else "step_tokens"
        else:
            full = decoding + len(jobs) >= self.limits.max_batch
            why = "max_batch" if full else "KV pages"
        self.held_up[why] = self.held_up.get(why, 0) + 1


def _cached(job: Job) -> int:
    """Tokens in whole pages, never all: the last row must be computed for what follows it."""
    return min(job.cached, job.known - 1) // PAGE_TOKENS * PAGE_TOKENS


def _view(job: Job) -> SequenceView:
    """Of a prompt that is being computed."""
    return SequenceView(job.key, (0, job.number), job.known, job.computed, job.pages, 0, job.pages)
