"""How many tokens to draft in a step: a pure function of what was measured.

A draft costs a row in the next step and a pass of the draft module now, and brings a token when it
is accepted. How much longer a step takes with so many drafts depends on the machine and the batch,
so it is measured while the engine runs: whole steps, by depth, for batches of about one size. What
was not measured is estimated from other depths, and from batches of other sizes: a depth that
could not win is not tried. Acceptance depends on the text; it is measured by depth. Both change, so
other depths are tried again, the less often the more a trial is expected to cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, log

TRIAL = 3  # steps for which a new choice holds: two of them can be measured
HOLD = 48  # the same at most, twice as many each time that it is made again
TRY_AGAIN = 500  # steps, at least, after which an unused depth is tried
SOON = 50  # the same after it has lost for the first time: by slow steps, perhaps
TRIALS = 0.0005  # part of the time that trials of a depth may cost
MARGIN = 1.03  # by which another depth must be predicted to be faster, and drafts at all
TEXT = 1024  # steps of sequences: how much of the work is prompts
MEMORY = 256  # drafts that an acceptance is about
LONGER = 0.02  # weight of a time longer than what is known: it may have been interrupted
SELDOM = 32  # steps
PAUSE = 1.25  # more than so many times what is known counts as that many
CHEAP = 0.15  # growth of a step by a draft while nothing is known, twice this by the first: hope
LEAST = 0.01  # growth
CROWDED = 0.25  # growth is as this power of the batch: its rows are less and less for free


@dataclass(frozen=True, slots=True)
class Measured:
    """What a choice is made from.

    acceptance[j]: part of the drafts j + 1 tokens ahead that came true, of those whose
    predecessors had. Of batches of the present size, by depth: seconds, of a step for each of its
    sequences (None: not known); growth, by which part it is expected to be longer than without
    drafts, from batches of another size; unused, the steps since a depth was last used; lost, how
    often in a row it was used and then left. prompts: seconds that prompts take for each token of
    an answer, by depth; with more rows beside them they take longer. depth: in use. answer: tokens
    of one; its first comes with the prompt, whatever is drafted.
    """

    acceptance: tuple[float, ...]
    seconds: tuple[float | None, ...]
    growth: tuple[float, ...]
    unused: tuple[int, ...]
    lost: tuple[int, ...]
    prompts: tuple[float, ...]
    depth: int = 0
    answer: float = inf


@dataclass(frozen=True, slots=True)
class Choice:
    """`rates`: tokens/s predicted for 0, 1, ... drafts, once anything is known."""

    depth: int
    rates: tuple[float, ...] = ()


DepthPolicy = Callable[[Measured], Choice]


def choose_depth(measured: Measured) -> Choice:
    """Drafts to make for each decoding sequence, 0 to as many as anything was measured of.

    A depth that was long unused is on trial. Else the one with the best predicted rate, if it is
    clearly better than the one in use.
    """
    times = estimated_seconds(measured.seconds, measured.growth)
    if not times:
        return Choice(0)
    rates = []
    for depth, (seconds, prompts) in enumerate(zip(times, measured.prompts, strict=True)):
        steps = 1 / expected_tokens(measured.acceptance[:depth])  # for a token
        rates.append(1 / (seconds * (steps + (1 - steps) / measured.answer) + prompts))
    best = max(range(len(rates)), key=lambda d: rates[d])
    for depth, rate in enumerate(rates):
        cost = times[depth] / times[best] * (1 - rate / rates[best])  # of a step, in steps
        patience = max(TRY_AGAIN, TRIAL * cost / TRIALS)
        if measured.lost[depth] == 1:
            patience = SOON
        if measured.unused[depth] >= patience:
            return Choice(depth, tuple(rates))
    prospects = [rates[0] * MARGIN, *rates[1:]]
    best = max(range(len(rates)), key=lambda d: prospects[d])
    if prospects[best] <= MARGIN * prospects[measured.depth]:
        best = measured.depth
    return Choice(best, tuple(rates))


def estimated_seconds(seconds: Sequence[float | None], growth: Sequence[float]) -> list[float]:
    """Of each depth: as measured, or longer than without drafts as `growth` says, in the scale of
    the nearest depth that was measured. Empty as long as nothing is known without drafts."""
    alone = seconds[0]
    if alone is None:
        return []
    grown = {d: max(s / alone - 1, 0.0) for d, s in enumerate(seconds) if d and s is not None}
    found = []
    for depth, own in enumerate(seconds):
        if own is None:
            near = min(grown, key=lambda d: abs(d - depth), default=0)
            scale = grown[near] / growth[near] if near else 1.0
            own = alone * (1 + growth[depth] * scale)
        found.append(own)
    return found


def expected_tokens(acceptance: Sequence[float]) -> float:
    """Tokens that a sequence gets of a step that verifies this many drafts."""
    total = likely = 1.0
    for p in acceptance:
        likely *= p
        total += likely
    return total


class _Size:
    """Of batches of about one size."""

    def __init__(self, most: int, batch: int) -> None:
        self.batch = batch
        self.seconds: list[float | None] = [None] * (most + 1)  # by depth, for each sequence
        self.row_s: list[float | None] = [None] * (most + 1)  # by depth, of a prompt's row
        self.used = [0] * (most + 1)  # by depth: the step in which it was used last
        self.alone = [-SELDOM] * (most + 1)  # by depth: the last step that had no prompts
        self.lost = [0] * (most + 1)
        self.steps = 0
        self.choice, self.hold, self.left = Choice(0), 0, 0  # steps: for which it holds, still

    def took(self, depth: int, seconds: float) -> None:
        """Of a depth that has been in use for some time, it is the machine's pace that changes."""
        before = self.seconds[depth]
        if before is not None and self.hold > TRIAL:
            self.seconds = [s and s * seconds / before for s in self.seconds]
        self.seconds[depth] = seconds


class DraftMeter:
    """Keeps what `Measured` says, and how many drafts were made and accepted at each depth."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.drafted = [0] * most
        self.accepted = [0] * most
        self.choice = Choice(0)
        self._trials = [4.0] * most  # as if four of four had come true: a trial is short
        self._successes = [4.0] * most
        self._sizes: dict[int, _Size] = {}
        self._size = _Size(most, 1)
        self._batch = 0
        self._stepped = 0, 0  # depth and batch of the last step
        self._rows, self._tokens, self._answers = 0.0, 1.0, 0.0  # rows: of prompts; fading

    @property
    def measured(self) -> Measured:
        size = self._size
        return Measured(
            tuple(s / t for s, t in zip(self._successes, self._trials, strict=True)),
            tuple(size.seconds),
            self._growth(size),
            tuple(size.steps - used for used in size.used),
            tuple(size.lost),
            tuple(self._row_s(size, d) * self._rows / self._tokens for d in range(self.most + 1)),
            size.choice.depth,
            max(1.0, self._tokens / self._answers) if self._answers else inf,
        )

    def choose(self, policy: DepthPolicy, batch: int) -> int:
        """The depth of a step in which `batch` sequences decode."""
        if not (self.most and batch):
            return 0
        fade = (1 - 1 / TEXT) ** batch
        self._rows, self._tokens = self._rows * fade, self._tokens * fade + batch
        self._answers *= fade
        size = self._size = self._size_of(batch)
        if not size.left:
            before, size.choice = size.choice.depth, policy(self.measured)
            same = size.choice.depth == before
            size.left = size.hold = min(max(TRIAL, 2 * size.hold), HOLD) if same else TRIAL
            size.lost[before] = 0 if same or not size.steps else size.lost[before] + 1
        size.left -= 1
        self.choice = size.choice
        self._batch = batch
        size.steps += 1
        size.used[self.choice.depth] = size.steps
        return self.choice.depth

    def verified(self, drafts: int, accepted: int) -> None:
        """`accepted` of a sequence's `drafts` came true; those behind a miss tell nothing."""
        self._tokens += accepted
        for depth in range(drafts):
            self.drafted[depth] += 1
            self.accepted[depth] += depth < accepted
        for depth in range(min(drafts, accepted + 1)):
            fade = 1 - 1 / MEMORY
            self._trials[depth] = self._trials[depth] * fade + 1
            self._successes[depth] = self._successes[depth] * fade + (depth < accepted)

    def answered(self) -> None:
        """A sequence has its last token."""
        self._answers += 1

    def step_took(self, seconds: float, prompt_rows: int) -> None:
        """The last step that `choose` was asked for, from the end of the one before it to its own.

        One that verified fewer or more drafts than it made says nothing of either. Where steps
        without prompts are seldom, what rows of prompts took without drafts is taken off.
        """
        depth, batch, size = self.choice.depth, self._batch, self._size
        self._rows += prompt_rows
        before, self._stepped = self._stepped, (depth, batch)
        if before[0] != depth or (before[1] != batch and not prompt_rows):
            return
        known = size.seconds[depth]
        if not prompt_rows:
            size.alone[depth] = size.steps
            own = seconds / batch
            size.took(depth, own if known is None else smoothed(known, own))
        elif depth and size.steps - size.alone[depth] > SELDOM:  # no smallest one of differences
            if taken := self._row_s(size, depth):
                own = max(seconds - taken * prompt_rows, seconds / 2) / batch
                size.seconds[depth] = own if known is None else known + (own - known) / 8
        elif known is not None:
            row = max(seconds - known * batch, 0.0) / prompt_rows
            row_s = size.row_s[depth]
            size.row_s[depth] = row if row_s is None else row_s + (min(row, 2 * row_s) - row_s) / 8

    def _row_s(self, size: _Size, depth: int) -> float:
        """Seconds of a prompt's row in a step with so many drafts, or with fewer if not known."""
        return next((s for s in reversed(size.row_s[: depth + 1]) if s is not None), 0.0)

    def _size_of(self, batch: int) -> _Size:
        """Exact to 7 sequences, then four sizes to a doubling."""
        scale = 1 << max(0, batch.bit_length() - 3)
        batch = batch // scale * scale
        if batch not in self._sizes:
            self._sizes[batch] = _Size(self.most, batch)
        return self._sizes[batch]

    def _growth(self, size: _Size) -> tuple[float, ...]:
        """`Measured.growth`, from the nearest size that knows it."""
        hoped = 0.0, *(CHEAP * (1 + depth) for depth in range(1, self.most + 1))
        known = [
            s
            for s in self._sizes.values()
            if s is not size and s.seconds[0] is not None and any(s.seconds[1:])
        ]
        if not known:
            return hoped
        near = min(known, key=lambda s: abs(log(s.batch / size.batch)))
        times = estimated_seconds(near.seconds, hoped)
        scale = (size.batch / near.batch) ** CROWDED
        return 0.0, *(max(scale * (s / times[0] - 1), LEAST) for s in times[1:])


def smoothed(old: float, new: float) -> float:
    """Seconds of what was measured again."""
    return min(new, old + LONGER * (min(new, PAUSE * old) - old))
