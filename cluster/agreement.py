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
    """What one member brings into the agreement."""

    kind: Kind
    rows: int
    newest_epoch: int


@dataclass(frozen=True, slots=True)
class Agreement:
    """What all members do next. rows: that each of them brings into the pass."""

    kind: Kind
    rows: tuple[int, ...]
    adopt: bool


def agree(votes: Sequence[Vote], epoch: int) -> Agreement:
    """The same for everybody, since all see the same votes.

    A new plan is adopted between two passes, once everybody has it.
    """
    newest = {vote.newest_epoch for vote in votes}
    kind = max(vote.kind for vote in votes)
    rows = tuple(vote.rows if vote.kind == kind else 0 for vote in votes)
    return Agreement(kind, rows, adopt=len(newest) == 1 and newest.pop() > epoch)


class Closed(BaseException):
    """A member is to end, and takes part in nothing any more. No error that a step may survive."""
