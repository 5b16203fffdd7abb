"""Which tokens the next engine step computes: a pure function over plain numbers.

Policy. Every sequence that only waits for its next token takes part in every step, so a long
prompt never stops the others; its drafts are verified in the same step if their pages are there,
and nobody gives way to a draft. What is left of the step's token budget goes to prompts, in chunks,
in order of (priority, arrival). A prompt is admitted when pages for all of it are there. When
decoding needs a page and none is left, the last sequence in that same order gives its pages back
and is computed again later ("preemption by recompute").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rayseek.kernels.kv_format import PAGE_TOKENS

LOOKAHEAD = 8  # waiting sequences that a step looks at


@dataclass(frozen=True, slots=True)
class Limits:
    """What one step may hold."""

    max_batch: int  # sequences running at once
    step_tokens: int  # rows of a step without decoding sequences
    chunk_tokens: int  # prompt rows of a step that also decodes: bounds the pause between tokens


@dataclass(frozen=True, slots=True)
class SequenceView:
    """The scheduler's view of a sequence.

    length: tokens known (prompt and emitted); computed: of these, in the cache;
    pages: held (running), or held once admitted without taking new ones (waiting: cached prefix);
    idle_pages: cached pages that nobody holds, which admission takes out of the available ones;
    sole_pages: pages that no other sequence holds, which preemption would give back;
    drafts: tokens to verify after the last known one.
    """

    key: str
    order: tuple[int, int]  # (priority, arrival); smaller goes first
    length: int
    computed: int
    pages: int
    idle_pages: int = 0
    sole_pages: int = 0
    drafts: int = 0

    @property
    def remaining(self) -> int:
        return self.length - self.computed

    def new_pages(self, upto: int) -> int:
        """Pages still to take before the first `upto` tokens fit."""
        return max(0, -(-upto // PAGE_TOKENS) - self.pages)


@dataclass(frozen=True, slots=True)
class Plan:
    """chunks: (key, rows to compute now), decoding sequences first; take: (key, new pages).

    A decoding sequence has a row for its last token and one for each draft to be verified.
    """

    chunks: tuple[tuple[str, int], ...] = ()
    admitted: tuple[str, ...] = ()
    preempted: tuple[str, ...] = ()
    take: tuple[tuple[str, int], ...] = ()


def plan_step(
    running: Sequence[SequenceView],
    waiting: Sequence[SequenceView],
    available: int,
    limits: Limits,
) -> Plan:
    """The next step, given `available` pages. Running sequences hold pages for their chunks.

    Guarantees (tested as properties): never more pages than available; every decoding sequence
    that is not preempted gets its row; only the last in order are preempted; if anything can run,
    something runs.
    """
    alive = sorted(running, key=lambda s: s.order)
    preempted: list[str] = []
    take: dict[str, int] = {}

    # Step 1: pages for the sequences that decode, oldest first; the newest pay for them.
    i = 0
    while i < len(alive):
        sequence = alive[i]
        need = sequence.new_pages(sequence.length) if sequence.remaining == 1 else 0
        while need > available and len(alive) > i:
            victim = alive.pop()
            preempted.append(victim.key)
            available += victim.sole_pages + take.pop(victim.key, 0)
        if len(alive) > i:
            available -= need
            if need:
                take[sequence.key] = need
            i += 1

    decoding = [s for s in alive if s.remaining == 1]
    chunks = []
    for sequence in decoding:  # drafts: as many as fit the pages there are
        more = sequence.new_pages(sequence.length + sequence.drafts) - take.get(sequence.key, 0)
        if 0 < more <= available and not preempted:
            available -= more
            take[sequence.key] = take.get(sequence.key, 0) + more
        room = (sequence.pages + take.get(sequence.key, 0)) * PAGE_TOKENS - sequence.computed
        chunks.append((sequence.key, min(1 + sequence.drafts, room)))
    budget = limits.chunk_tokens if decoding else limits.step_tokens

    # Step 2: go on with prompts that have begun.
    for sequence in alive:
        if sequence.remaining > 1 and budget > 0:
            rows = min(sequence.remaining, budget)
            chunks.append((sequence.key, rows))
            budget -= rows

    # Step 3: admit new prompts, strictly in order, none in a step that had to preempt.
    admitted: list[str] = []
    for sequence in sorted(waiting, key=lambda s: s.order):
        need = sequence.new_pages(sequence.length)
        if (
            preempted
            or budget <= 0
            or len(alive) + len(admitted) >= limits.max_batch
            or need + sequence.idle_pages > available
        ):
            break
        available -= need + sequence.idle_pages
        admitted.append(sequence.key)
        if need:
            take[sequence.key] = need
        rows = min(sequence.remaining, budget)
        chunks.append((sequence.key, rows))
        budget -= rows
    return Plan(tuple(chunks), tuple(admitted), tuple(preempted), tuple(take.items()))
