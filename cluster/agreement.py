"""What the members of a unit vote on before every pass, and how the votes are counted. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum


class Kind(IntEnum):
    """Of a pass. When several are wanted, the largest goes first."""

    NOTHING = 0
    FORWARD = 1
    DRAFT = 2


@dataclass(frozen=True, slots=True)
class Vote:
    """What one member brings into the agreement. alone: its pass has failed together with the
    others' rows, and is to show whether it was because of its own."""

    kind: Kind
    rows: int
    newest_epoch: int
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Agreement:
    """What all members do next. rows: that each of them brings into the pass. alone: the only
    member whose turn it is; None: it is everybody's."""

    kind: Kind
    rows: tuple[int, ...]
    adopt: bool
    alone: int | None = None

    def takes(self, member: int, kind: Kind) -> bool:
        """Whether this is the pass of this kind that a member wants."""
        return self.kind == kind and not self.adopt and self.alone in (None, member)

    def only(self, member: int) -> bool:
        """Whether nobody else's rows are in the pass."""
        return not any(rows for i, rows in enumerate(self.rows) if i != member)


def agree(votes: Sequence[Vote], epoch: int) -> Agreement:
    """The same for everybody, since all see the same votes.

    A new plan is adopted between two passes, once everybody has it. Who wants to be alone goes
    first, one after the other.
    """
    newest = {vote.newest_epoch for vote in votes}
    kind = max(vote.kind for vote in votes)
    alone = next((i for i, v in enumerate(votes) if v.alone and v.kind == kind), None)
    rows = tuple(
        vote.rows if vote.kind == kind and alone in (None, i) else 0 for i, vote in enumerate(votes)
    )
    return Agreement(kind, rows, len(newest) == 1 and newest.pop() > epoch, alone)


class PassFailed(RuntimeError):
    """Another member failed in a pass that had no rows but ours; the message says of what."""


class Unfit(BaseException):
    """Pass after pass fails in this process: it is to end, so that a new one can take its place.
    No error that a step may survive."""


class Closed(BaseException):
    """A member is to end, and takes part in nothing any more. No error that a step may survive."""
