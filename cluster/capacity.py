"""How many units a load needs: the config's units, filled as far as the targets allow.

Pure arithmetic in the mean, with a queue's formula for what fluctuates: no day's wave, no burst, no
death. A decode unit takes the largest batch whose step keeps the pace and whose latents fit;
prompts wait as in a queue of as many servers as ranks (Sakasegawa's approximation, equal services).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rayseek.cluster.config import Config, Role
from rayseek.cluster.cost import DEVICES, PUBLISHED, Cost, Efficiency, Step
from rayseek.cluster.fit import rank_memories
from rayseek.cluster.placement import slots_per_holder
from rayseek.model.config import ModelConfig

FILLED = 0.85  # of a unit's room or time, at most: the rest is for what fluctuates
MOST_UNITS = 10_000


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
    """Units of one role. busy: part of their room or time in use. tokens_s: most of one GPU.

    limit: what keeps a unit from more. seconds: to the first token, or between two.
    """

    role: Role
    units: int
    gpus: int
    busy: float
    tokens_s: float
    batch: int
    seconds: float
    limit: str


def needs(
    config: Config,
    model: ModelConfig,
    load: Load,
    targets: Targets,
    efficiency: Efficiency = PUBLISHED,
) -> list[Need]:
    """What each role needs; a decode unit alone has a role and computes prompts too.

    Raises ValueError if no number of such units meets the targets, or for CPUs, whose rates nobody
    has written down.
    """
    costs = {role: unit_cost(config, model, role, efficiency) for role in config.units}
    batch, step, limit = _decode_batch(config, model, costs["decode"], load, targets)
    kept = tokens_kept(config, load.accepted)
    per_gpu = batch * kept / step.seconds
    wanted = load.requests_s * load.output
    ranks = config.decode.attention_ranks
    prefill_role: Role = "prefill" if config.prefill.units else "decode"
    prompt_cost = costs[prefill_role]
    rows = config.engine_of(prefill_role).step_tokens
    prompt_step = prompt_cost.prefill(rows, load.prompt, load.prompt * load.cached)
    prompt_gpu = rows / prompt_step.seconds
    fresh = load.prompt * (1 - load.cached)
    if prefill_role == "decode":
        # A unit's time goes to both; a prompt's first token waits for its turn among the steps.
        share = (wanted / per_gpu + load.requests_s * fresh / prompt_gpu) / ranks
        units = max(1, math.ceil(share / FILLED))
        units, first = _prompt_units(
            units, ranks, load.requests_s, fresh / prompt_gpu, step.seconds, targets, share * ranks
        )
        decode = Need(
            "decode",
            units,
            units * ranks,
            share / units,
            per_gpu,
            batch,
            step.seconds / kept,
            limit,
        )
        prompts = Need(
            "prefill", units, 0, share / units, prompt_gpu, rows, first, prompt_step.limit
        )
        return [prompts, decode]
    units = max(1, math.ceil(wanted / (per_gpu * ranks) / FILLED))
    decode = Need(
        "decode", units, units * ranks, wanted / (per_gpu * ranks * units), per_gpu, batch,
        step.seconds / kept, limit,
    )  # fmt: skip
    ranks = config.prefill.attention_ranks
    busy = load.requests_s * fresh / prompt_gpu
    units, first = _prompt_units(
        max(1, math.ceil(busy / ranks / FILLED)), ranks, load.requests_s, fresh / prompt_gpu,
        step.seconds, targets, busy,
    )  # fmt: skip
    return [
        Need(
            "prefill", units, units * ranks, busy / (ranks * units), prompt_gpu, rows, first,
            prompt_step.limit,
        ),
        decode,
    ]  # fmt: skip


def unit_cost(config: Config, model: ModelConfig, role: Role, efficiency: Efficiency) -> Cost:
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
    return Cost(model, device, unit.attention_ranks, slots, efficiency, kv_dtype)


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


def _prompt_units(
    units: int,
    ranks: int,
    requests_s: float,
    service_s: float,
    step_s: float,
    targets: Targets,
    busy: float,
) -> tuple[int, float]:
    """The fewest units, from `units` on, whose first tokens come in time, and when they come.

    busy: servers' worth of work.
    """
    if service_s + step_s > targets.first_token_s:
        raise ValueError(
            f"a prompt alone takes {service_s + step_s:.1f} s on one rank, more than "
            f"{targets.first_token_s:g} s to the first token"
        )
    while units < MOST_UNITS:
        servers = units * ranks
        used = busy / servers
        waiting = used ** (math.sqrt(2 * (servers + 1)) - 1) / (servers * (1 - used)) / 2
        first = service_s * (1 + waiting) + step_s
        if first <= targets.first_token_s:
            return units, first
        units += 1
    raise ValueError(f"{MOST_UNITS} units are not enough for {requests_s:g} requests/s")
