"""How many tokens to draft in a step: a pure function of what was measured.

A draft costs a row in the next step and a pass of the draft module now, and brings a token when it
is accepted. How much a row costs depends on the machine and the batch, so it is measured while the
engine runs: seconds by number of rows, for verification and for drafting. Acceptance depends on the
text; it is measured by depth. Every depth is tried again now and then, as both change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

HOLD = 4  # steps for which a choice holds, unless the batch changes
TRY_AGAIN = 500  # steps after which an unused depth is tried
MARGIN = 1.08  # by which more drafts must be predicted to be faster: some of their cost is not seen
MEMORY = 256  # drafts that an acceptance is about
LONGER, SHORTER = 0.1, 0.5  # weights of a new measurement of time: what took long was interrupted
PAUSE = 1.25  # more than so many times what is known counts as that many


@dataclass(frozen=True, slots=True)
class Measured:
    """What a choice is made from.

    acceptance[j]: part of the drafts j + 1 tokens ahead that came true, of those whose
    predecessors had. step_s, draft_s: seconds of a verifying step and of one draft pass, by rows,
    ascending. unused[d]: steps since depth d was last used.
    """

    acceptance: tuple[float, ...]
    step_s: tuple[tuple[int, float], ...]
    draft_s: tuple[tuple[int, float], ...]
    unused: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """`rates`: tokens/s predicted for each depth (empty before anything is known)."""

    depth: int
    rates: tuple[float, ...] = ()


DepthPolicy = Callable[[Measured, int, int], Choice]


def choose_depth(measured: Measured, batch: int, most: int) -> Choice:
    """Drafts to make for each of `batch` decoding sequences, 0 to `most`.

    The depth with the best predicted rate; the smaller one unless the gain is clear. A depth that
    was not used for TRY_AGAIN steps comes first.
    """
    rates = []
    for depth in range(most + 1):
        step = interpolated(measured.step_s, batch * (1 + depth))
        draft = interpolated(measured.draft_s, batch) if depth else 0.0
        if step is None or draft is None:
            return Choice(most)  # nothing is known yet: find out
        rates.append(batch * expected_tokens(measured.acceptance[:depth]) / (step + depth * draft))
    stale = max(range(most + 1), key=lambda d: measured.unused[d])
    if measured.unused[stale] >= TRY_AGAIN:
        return Choice(stale, tuple(rates))
    best = 0
    for depth in range(1, most + 1):
        if rates[depth] > MARGIN * rates[best]:
            best = depth
    return Choice(best, tuple(rates))


def expected_tokens(acceptance: Sequence[float]) -> float:
    """Tokens that a sequence gets of a step that verifies this many drafts."""
    total = likely = 1.0
    for p in acceptance:
        likely *= p
        total += likely
    return total


def interpolated(points: Sequence[tuple[int, float]], at: int) -> float | None:
    """Seconds for `at` rows from measured points: linear between, and beyond, at least constant."""
    if not points:
        return None
    if len(points) == 1:
        rows, seconds = points[0]
        return seconds * (1 + at / rows) / 2  # half of it fixed: a guess that a trial replaces
    after = next((i for i, (rows, _) in enumerate(points) if rows >= at), len(points) - 1)
    (r0, s0), (r1, s1) = points[max(after - 1, 0)], points[max(after, 1)]
    if at > r1:
        s1 = max(s0, s1)
    return max(s0 + (s1 - s0) * (at - r0) / (r1 - r0), min(s0, s1) / 2)


class DraftMeter:
    """Keeps what `Measured` says, and how many drafts were made and accepted at each depth."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.drafted = [0] * most
        self.accepted = [0] * most
        self.choice = Choice(0)
        self._trials = [1.0] * most  # as if one of one had come true: try first
        self._successes = [1.0] * most
        self._step_s: dict[int, float] = {}
        self._draft_s: dict[int, float] = {}
        self._unused = [TRY_AGAIN] * (most + 1)  # try each at the start
        self._held, self._batch = 0, 0

    @property
    def measured(self) -> Measured:
        return Measured(
            tuple(s / t for s, t in zip(self._successes, self._trials, strict=True)),
            tuple(sorted(self._step_s.items())),
            tuple(sorted(self._draft_s.items())),
            tuple(self._unused),
        )

    def choose(self, policy: DepthPolicy, batch: int) -> int:
        """The depth of a step in which `batch` sequences decode."""
        if not (self.most and batch):
            return 0
        self._held -= 1
        if self._held <= 0 or batch != self._batch:
            self.choice = policy(self.measured, batch, self.most)
            self._held, self._batch = HOLD, batch
        self._unused = [n + 1 for n in self._unused]
        self._unused[self.choice.depth] = 0
        return self.choice.depth

    def verified(self, drafts: int, accepted: int) -> None:
        """`accepted` of a sequence's `drafts` came true; those behind a miss tell nothing."""
        for depth in range(drafts):
            self.drafted[depth] += 1
            self.accepted[depth] += depth < accepted
        for depth in range(min(drafts, accepted + 1)):
            fade = 1 - 1 / MEMORY
            self._trials[depth] = self._trials[depth] * fade + 1
            self._successes[depth] = self._successes[depth] * fade + (depth < accepted)

    def step_took(self, rows: int, seconds: float) -> None:
        """A step without prompts, from the end of the step before it, but for its drafts."""
        _smooth(self._step_s, rows, seconds)

    def draft_took(self, rows: int, seconds: float) -> None:
        """One draft pass."""
        _smooth(self._draft_s, rows, seconds)


def _smooth(table: dict[int, float], rows: int, seconds: float) -> None:
    """Steps of similar size share an entry: exact to 8 rows, then eight sizes to a doubling."""
    scale = 1 << max(0, rows.bit_length() - 4)
    key = rows // scale * scale
    old = table.setdefault(key, seconds)
    table[key] += SHORTER * min(seconds - old, 0) + LONGER * max(min(seconds, PAUSE * old) - old, 0)
