"""Step times of a CPU engine out of what `rayseek bench` measured, and the check of both.

The engine is simulated under the bench's own load (streams that send one request after another),
so what is fitted is what is predicted with: tokens/s and both latencies, of every point, by least
squares of logarithms (Levenberg and Marquardt's way), with parameters that cannot be negative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
from numpy.typing import NDArray

from rayseek.cluster.config import Config
from rayseek.cluster.fit import rank_memories
from rayseek.cluster.scheduler import Limits
from rayseek.cluster.simulated_unit import Job, SimulatedUnit
from rayseek.cluster.step_times import Measured
from rayseek.kernels.kv_format import PAGE_TOKENS
from rayseek.model.config import ModelConfig

FIRST_GUESS = (1e-3, 3e-3, 3e-4, 3e-4, 1e-6, 3e-7)  # of Measured's seconds, in their order
Floats = NDArray[np.float64]
ROUNDS = 30  # of improvement, at most
NUDGE = 0.03  # of a parameter's logarithm, to see what it does


@dataclass(frozen=True, slots=True)
class Sample:
    """One point of a bench: so many streams, each of which sends `rounds` requests in turn.

    tokens_s of all streams; first_s and between_s: medians over the requests.
    """

    streams: int
    rounds: int
    prompt: int
    output: int
    tokens_s: float
    first_s: float
    between_s: float

    @property
    def figures(self) -> tuple[float, float, float]:
        return self.tokens_s, self.first_s, self.between_s


def predicted(sample: Sample, config: Config, model: ModelConfig, times: Measured) -> Sample:
    """What a simulated engine of this config does under the same load, without drafts.

    Raises ValueError if a sequence does not fit into its pages.
    """
    engine = config.engine_of("decode")
    (memory,) = (m for m in rank_memories(config, model) if m.role == "attention")
    if sample.prompt + sample.output > memory.tokens:
        raise ValueError(f"{sample.prompt} + {sample.output} tokens: more than a rank's pages hold")
    limits = Limits(engine.max_batch, engine.step_tokens, engine.chunk_tokens)
    unit = SimulatedUnit(1, limits, memory.tokens // PAGE_TOKENS, 1.0, times)
    left = [sample.rounds] * sample.streams
    sent: dict[int, float] = {}
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    now = 0.0

    def send(stream: int) -> None:
        left[stream] -= 1
        number = len(sent)
        sent[number] = now
        unit.add(Job(number, sample.prompt, sample.output, 0, stream), 0)

    for stream in range(sample.streams):
        send(stream)
    while (then := unit.begin(now, math.inf)) < math.inf:
        now = then
        begun, done = unit.end()
        for job in begun:
            first.setdefault(job.number, now)  # a preempted one has begun before
        for job in done:
            last[job.number] = now
            if left[job.owner]:
                send(job.owner)
    tokens = sample.streams * sample.rounds * sample.output
    between = [(last[n] - first[n]) / max(1, sample.output - 1) for n in sent]
    waited = [first[n] - sent[n] for n in sent]
    return replace(sample, tokens_s=tokens / now, first_s=median(waited), between_s=median(between))


def fitted(samples: Sequence[Sample], config: Config, model: ModelConfig) -> Measured:
    """The step times that come closest to all figures. Raises ValueError for too few samples."""
    if len(samples) * 3 < 2 * len(FIRST_GUESS):
        raise ValueError(f"{len(samples)} points of a bench are too few to fit step times to")

    def misses(logs: Floats) -> Floats:
        times = _times(logs, model)
        found = [predicted(sample, config, model, times) for sample in samples]
        return np.array(
            [
                math.log(a / b)
                for here, there in zip(found, samples, strict=True)
                for a, b in zip(here.figures, there.figures, strict=True)
                if b
            ]
        )

    logs, damping = np.log(FIRST_GUESS), 1e-2
    now = misses(logs)
    for _ in range(ROUNDS):
        slopes = np.stack(
            [(misses(logs + step) - now) / NUDGE for step in np.eye(len(logs)) * NUDGE], axis=1
        )
        square = slopes.T @ slopes
        move = np.linalg.solve(square + damping * np.eye(len(logs)), -slopes.T @ now)
        moved = logs + np.clip(move, -2, 2)
        then = misses(moved)
        gain = float(now @ now - then @ then)
        if gain > 0:
            logs, now, damping = moved, then, damping / 3
        else:
            damping *= 4
        if 0 < gain < 1e-4 * float(now @ now) or damping > 1e4:
            break
    return _times(logs, model)


def _times(logs: Floats, model: ModelConfig) -> Measured:
    step, experts, row, prompt_row, latent, prompt_latent = np.exp(logs).tolist()
    return Measured(step, experts, row, prompt_row, latent, prompt_latent, model)
