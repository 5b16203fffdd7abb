"""How long a step of a unit takes: from the cost model of a GPU, or from numbers that were fitted
to measurements (cluster/fitting.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from rayseek.cluster.cost import Cost
from rayseek.model.config import ModelConfig

CONTEXT_GRAIN = 32  # tokens: contexts closer than this take the same time


@dataclass(frozen=True, slots=True)
class StepWork:
    """Rows of one step.

    batch: sequences that decode on the fullest rank; context: tokens that each of their rows sees.
    rows: of prompts, on the fullest rank; mean_rows: on all ranks in the mean; seen: tokens that
    each of these rows sees, in the mean.
    """

    batch: int = 0
    context: float = 0.0
    rows: int = 0
    mean_rows: float = 0.0
    seen: float = 0.0


class StepTimes(Protocol):
    """Seconds of a step, and what limits it."""

    def of(self, work: StepWork) -> tuple[float, str]: ...


class Roofline:
    """By the cost model. What decodes and what computes prompts takes turns in a step: the times
    add up, as they do in capacity.py."""

    def __init__(self, cost: Cost, drafts: int) -> None:
        """drafts: tokens verified for each sequence in each step."""
        self._cost, self._rows = cost, 1 + drafts
        self._known: dict[tuple[int, int], tuple[float, str]] = {}

    def of(self, work: StepWork) -> tuple[float, str]:
        seconds, limit = 0.0, "operations"
        if work.batch:
            key = work.batch, int(work.context / CONTEXT_GRAIN)
            if key not in self._known:
                step = self._cost.decode(work.batch, (key[1] + 0.5) * CONTEXT_GRAIN, self._rows)
                self._known[key] = step.seconds, step.limit
            seconds, limit = self._known[key]
        if work.rows:
            step = self._cost.prefill(work.rows, 2 * work.seen, mean_rows=work.mean_rows)
            if step.seconds > seconds:
                limit = step.limit
            seconds += step.seconds
        return seconds, limit


@dataclass(frozen=True, slots=True)
class Measured:
    """A CPU engine's step, in seconds: `step` for any; `experts` for reading every expert once,
    of which a step reads those that its rows choose; `row` for a row that decodes, `prompt_row`
    for one of a prompt; `latent` for each token that a decoding row sees, `prompt_latent` for each
    that a prompt's row sees, whose latents are read for many rows at once."""

    step: float
    experts: float
    row: float
    prompt_row: float
    latent: float
    prompt_latent: float
    model: ModelConfig
    drafts: int = 0

    def of(self, work: StepWork) -> tuple[float, str]:
        decoding = work.batch * (1 + self.drafts)
        unread = 1 - self.model.num_experts_per_tok / self.model.n_routed_experts
        parts = {
            "steps": self.step,
            "memory": self.experts * (1 - unread ** (decoding + work.rows)),
            "operations": self.row * decoding + self.prompt_row * work.rows,
            "attention": self.latent * decoding * work.context
            + self.prompt_latent * work.rows * work.seen,
        }
        return math.fsum(parts.values()), max(parts, key=parts.__getitem__)
