"""What an engine's steps do, in counts and seconds, since its start. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter

IDLE = "idle"


@dataclass(frozen=True, slots=True)
class Work:
    """seconds: of the engine's thread by stage: plan, model, sample, draft; idle: between steps.

    prompt_rows, decode_rows: rows computed of prompts, and of sequences that decode.
    """

    steps: int
    preemptions: int
    prompt_rows: int
    decode_rows: int
    seconds: Mapping[str, float]


class StepClock:
    """Adds up the time between `enter`s; a step has some five of them. One thread only enters."""

    def __init__(self) -> None:
        self._seconds = {IDLE: 0.0}
        self._stage, self._since = IDLE, perf_counter()
        self.prompt_rows = self.decode_rows = 0

    def enter(self, stage: str) -> None:
        now = perf_counter()
        self._seconds[self._stage] = self._seconds.get(self._stage, 0.0) + now - self._since
        self._stage, self._since = stage, now

    @property
    def seconds(self) -> dict[str, float]:
        """So far, without the stage that is going on; for any thread."""
        return dict(self._seconds)
