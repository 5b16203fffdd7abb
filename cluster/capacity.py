"""How many units a load needs: the config's units, filled as far as the targets allow.

Pure arithmetic in the mean, with a queue's formula for what fluctuates: no day's wave, no burst, no
death. A full decode unit has the largest batch whose step keeps the pace and whose latents fit; how
fast steps and first tokens are at the load itself, `_pace` says.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, replace

from rayseek.cluster.config import Config, Role
from rayseek.cluster.cost import DEVICES, Cost, Step
from rayseek.cluster.fit import rank_memories
from rayseek.cluster.placement import slots_per_holder
from rayseek.model.config import ModelConfig

FILLED = 0.85  # of a unit's room or time, or of a target, at most: the rest is for what fluctuates
MOST_UNITS = 10_000
ROUNDS = 30  # until what a step takes has settled


@dataclass(frozen=True, slots=True)
class Load:
    """Means. cached: part of a prompt that is in a prefix cache. accepted: of drafts."""

    requests_s: float
    prompt: int
    output: int
    cached: float = 0.0
    accepted: float = 0.85


@dataclass(frozen=True, slots=True)
class Targets:
    """Seconds to the first token, and between two."""

    first_token_s: float
    token_s: float


@dataclass(frozen=True, slots=True)
class Need:
    """Units of one role. busy: part of their room or time in use. tokens_s: of a GPU of a full
    unit, whose ranks have `batch` rows; limit: what keeps it from more. seconds: at this load, to
    the first token, or between two. step_s: of a decode unit that has as much as it may.
    """

    role: Role
    units: int
    gpus: int
    busy: float
    tokens_s: float
    batch: int
    seconds: float
    step_s: float
    limit: str


def needs(config: Config, model: ModelConfig, load: Load, targets: Targets) -> list[Need]:
    """What each role needs; a decode unit alone has a role and computes prompts too.

    Raises ValueError if no number of such units meets the targets, or for CPUs, whose rates nobody
    has written down.
    """
    costs = {role: unit_cost(config, model, role) for role in config.units}
    batch, step, limit = _decode_batch(config, model, costs["decode"], load, targets)
    kept = tokens_kept(config, load.accepted)
    per_gpu = batch * kept / step.seconds
    computes: Role = "prefill" if config.prefill.units else "decode"  # prompts
    rows = config.engine_of(computes).step_tokens
    prompt_step = costs[computes].prefill(rows, load.prompt, load.prompt * load.cached)
    prompt_gpu = rows / prompt_step.seconds
    work = dict.fromkeys(config.units, 0.0)  # GPUs that do nothing else
    work["decode"] += load.requests_s * load.output / per_gpu
    work[computes] += load.requests_s * load.prompt * (1 - load.cached) / prompt_gpu

    def pace(role: Role, units: int, requests_s: float) -> Pace:
        return _pace(config, costs[role], role, replace(load, requests_s=requests_s), units)

    alone = pace(computes, 1, 0.0).first_s
    if alone > FILLED * targets.first_token_s:
        raise ValueError(
            f"a prompt alone takes {alone:.1f} s, too long for {targets.first_token_s:g} s to the "
            "first token"
        )

    def keeps(role: Role, units: int, requests_s: float) -> bool:
        found = pace(role, units, requests_s)
        first = found.first_s if role == computes else 0.0
        between = found.step_s / kept if role == "decode" else 0.0
        return first <= FILLED * targets.first_token_s and between <= FILLED * targets.token_s

    counts: dict[Role, int] = {}
    for role in config.units:
        at_least = math.ceil(work[role] / config.units[role].attention_ranks / FILLED)
        several = range(max(1, at_least), MOST_UNITS)
        found = bisect_left(several, True, key=lambda n: keeps(role, n, load.requests_s))
        if found == len(several):
            raise ValueError(
                f"{MOST_UNITS} units are not enough for {load.requests_s:g} requests/s"
            )
        counts[role] = several[found]

    def need(role: Role, of: Role, gpu: float, many: int, step_s: float, limit: str) -> Need:
        units, ranks = counts[of], config.units[of].attention_ranks
        at_load = pace(of, units, load.requests_s)
        seconds = at_load.first_s if role == "prefill" else at_load.step_s / kept
        gpus, busy = units * ranks if role == of else 0, work[of] / units / ranks
        return Need(role, units, gpus, busy, gpu, many, seconds, step_s, limit)

    full = load.requests_s * FILLED * config.decode.attention_ranks / work["decode"]
    parts = range(1, 100)
    part = bisect_left(parts, True, key=lambda x: not keeps("decode", 1, full * x / 100))
    most_step_s = pace("decode", 1, full * (part + 1) / 100).step_s
    return [
        need("prefill", computes, prompt_gpu, rows, 0.0, prompt_step.limit),
        need("decode", "decode", per_gpu, batch, most_step_s, limit),
    ]


def unit_cost(config: Config, model: ModelConfig, role: Role) -> Cost:
    """The cost model of a unit of this role. Raises ValueError for CPUs."""
    if config.hardware.accelerator not in DEVICES:
        raise ValueError(
            "plans are for GPU configs: hardware.accelerator is cpu, whose step times only a bench "
            "can tell (--fit)"
        )
    unit = config.units[role]
    slots = slots_per_holder(model.n_routed_experts, unit.holders, unit.redundant_experts)
    device = DEVICES[config.hardware.accelerator]
    kv_dtype = config.engine.kv_dtype
    return Cost(model, device, unit.attention_ranks, slots, kv_dtype=kv_dtype)


def tokens_kept(config: Config, accepted: float) -> float:
    """Tokens that a sequence keeps of a step: one, and the drafts until one is wrong. accepted:
    part of the drafts that come true."""
    return 1 + sum(accepted**depth for depth in range(1, config.engine.draft_tokens + 1))


def _decode_batch(
    config: Config, model: ModelConfig, cost: Cost, load: Load, targets: Targets
) -> tuple[int, Step, str]:
    """The largest batch of a rank, its step, and what bounds it."""
    (room,) = (
        m.tokens for m in rank_memories(config, model) if (m.of, m.role) == ("decode", "attention")
    )
    fits = int(room // (load.prompt + load.output))
    most, bound = min((fits, "KV pages"), (config.engine_of("decode").max_batch, "max_batch"))
    if most < 1:
        raise ValueError(
            f"a sequence of {load.prompt + load.output:,} tokens does not fit into the "
            f"{room:,} that a decode rank's pages hold"
        )
    context, rows = load.prompt + load.output / 2, 1 + config.engine.draft_tokens
    pace = targets.token_s * tokens_kept(config, load.accepted)
    for batch in range(most, 0, -1):
        step = cost.decode(batch, context, rows)
        if step.seconds <= pace:
            return batch, step, bound if batch == most else f"{step.limit}, at this pace"
    best = cost.decode(1, context, rows).seconds / tokens_kept(config, load.accepted)
    raise ValueError(
        f"such a decode unit needs {best * 1e3:.0f} ms between tokens at best, more than "
        f"{targets.token_s * 1e3:.0f}"
    )


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds of a unit's steps, and to a first token."""

    step_s: float
    first_s: float


def _pace(config: Config, cost: Cost, role: Role, load: Load, units: int) -> Pace:
    """What so many units keep under this load, in the mean.

    Ranks of a unit step together, so a step takes as long as the rank with the most rows needs; in
    it come the rows of the next. A prompt waits for the step under way, for those before it on its
    rank (as in a queue of equal services), and for its own steps.
    """
    engine, ranks = config.engine_of(role), config.units[role].attention_ranks
    decodes = role == "decode"
    rows = engine.chunk_tokens if decodes else engine.step_tokens
    rate = load.requests_s / units / ranks
    known = load.prompt * load.cached
    fresh = max(1.0, load.prompt - known)
    if decodes and config.prefill.units:
        fresh = 1.0  # the others' pages are there
    parts = math.ceil(fresh / rows)

    def decoding(step_s: float) -> float:
        if not decodes:
            return 0.0
        batch = round(rate * load.output * step_s / tokens_kept(config, load.accepted))
        context, drafts = load.prompt + load.output / 2, config.engine.draft_tokens
        return cost.decode(max(1, batch), context, 1 + drafts).seconds

    def prompts(most: float, mean: float) -> float:
        return cost.prefill(most, load.prompt, known, mean).seconds

    full = prompts(rows, rows)
    step = 2 * full + decoding(full)
    for _ in range(ROUNDS):  # a step is as long as what comes in it makes the next
        come = rate * step
        some = 1 - math.exp(-ranks * come * parts) if decodes else 1.0  # of the steps have prompts
        fullest = min(rows, fresh * max(1.0, come + math.sqrt(2 * math.log(ranks) * come)))
        mean = min(fullest, come * fresh / some) if come else 0.0
        step = decoding(step) + some * prompts(fullest, mean)
    service = fresh / rows * (decoding(step) + full)
    used = rate * service
    waiting = service * used / (1 - used) / 2 if used < 1 else math.inf
    return Pace(step, step * (parts + 0.5) + waiting)
