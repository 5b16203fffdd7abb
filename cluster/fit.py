"""Whether a config fits its model and machines: bytes of every kind of rank, and what is wrong.

Pure arithmetic on the ledger; needs no torch. Weights and pages are exact; the workspace (what a
step needs besides) is an estimate that errs upwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rayseek.cluster.config import Config, EngineSettings, Role
from rayseek.cluster.placement import slots_per_holder
from rayseek.cluster.succession import Room
from rayseek.cluster.wire_rows import WireRows
from rayseek.kernels.kv_format import token_bytes
from rayseek.model.config import ModelConfig
from rayseek.model.ledger import Ledger, make_ledger

GIB = 2**30
UNEVEN = 1.5  # rows that a rank's experts get, against the mean
RUNTIME_GIB = {"cpu": 0.5}  # interpreter and libraries
CUDA_RUNTIME_GIB = 3.0  # the context, NCCL's buffers, the allocator's gaps


@dataclass(frozen=True, slots=True)
class RankMemory:
    """The memory of one kind of rank. `parts` by name, in bytes; `limit`: None if unknown.

    tokens: of KV that its pages hold; 0 for expert ranks.
    """

    of: Role
    role: Literal["attention", "expert"]
    parts: dict[str, int]
    limit: int | None
    tokens: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def missing(self) -> int:
        """Bytes too many; 0 if it fits, or if nobody knows."""
        return 0 if self.limit is None else max(0, self.total - self.limit)


def rank_memories(config: Config, model: ModelConfig) -> list[RankMemory]:
    """Every kind of rank that the config starts."""
    found = []
    for role, unit in config.units.items():
        slots = slots_per_holder(model.n_routed_experts, unit.holders, unit.redundant_experts)
        copies = slots * unit.holders - model.n_routed_experts
        ledger = make_ledger(model, unit.holders, copies)
        found.append(_attention(config, model, role, ledger))
        if unit.experts == "dedicated":
            found.append(_expert(config, model, role, ledger))
    return found


def room(config: Config, model: ModelConfig, role: Role) -> Room | None:
    """What a rank of this role can hold of experts: what the config gives it, and what is free
    besides. None: nobody knows."""
    unit = config.units[role]
    slots = slots_per_holder(model.n_routed_experts, unit.holders, unit.redundant_experts)
    ledger = make_ledger(model, unit.holders, slots * unit.holders - model.n_routed_experts)
    kind = "attention" if unit.experts == "colocated" else "expert"
    (memory,) = (m for m in rank_memories(config, model) if (m.of, m.role) == (role, kind))
    if memory.limit is None:
        return None
    free = max(0, memory.limit - memory.total) // (ledger.slot_bytes + ledger.mtp_slot_bytes)
    return Room(slots + free, whole_layers=config.hardware.accelerator != "cpu")


def bearable_deaths(config: Config, model: ModelConfig, role: Role) -> int | None:
    """How many holders of a unit may be dead at once while the others have memory for all experts;
    with more, the unit waits for successors. None: nobody knows, or experts are in one place."""
    there, holders = room(config, model, role), config.units[role].holders
    if there is None or holders == 1:
        return None
    return holders - -(-model.n_routed_experts // min(there.slots, model.n_routed_experts))


def _attention(config: Config, model: ModelConfig, role: Role, ledger: Ledger) -> RankMemory:
    engine, unit = config.engine_of(role), config.units[role]
    own = ledger.slots if unit.experts == "colocated" else 0
    of = {row.kind: row.rank_bytes for row in ledger.rows}
    shared = of["shared expert"]
    pages = int(engine.cache_gib * GIB)
    return RankMemory(
        role,
        "attention",
        {
            "attention, dense, head": ledger.rank_bytes - ledger.slots * ledger.slot_bytes - shared,
            "shared expert": shared,
            "experts": own * ledger.slot_bytes,
            "MTP": ledger.mtp_rank_bytes - (ledger.slots - own) * ledger.mtp_slot_bytes,
            "KV pages": pages,
            "workspace": _workspace(config, model, role, attention=True),
        },
        _limit(config),
        int(pages // _token_bytes(config, model, engine)),
    )


def _expert(config: Config, model: ModelConfig, role: Role, ledger: Ledger) -> RankMemory:
    return RankMemory(
        role,
        "expert",
        {
            "experts": ledger.slots * ledger.slot_bytes,
            "MTP": ledger.slots * ledger.mtp_slot_bytes,
            "workspace": _workspace(config, model, role, attention=False),
        },
        _limit(config),
        0,
    )


def _limit(config: Config) -> int | None:
    gib = config.hardware.rank_gib
    return None if gib is None else int(gib * GIB)


def _token_bytes(config: Config, model: ModelConfig, engine: EngineSettings) -> int:
    """KV bytes of a token, in all layers that have pages."""
    device = "cpu" if config.hardware.accelerator == "cpu" else "cuda"
    layers = model.num_hidden_layers
    if engine.draft_tokens:
        layers += model.num_nextn_predict_layers
    rope = model.qk_rope_head_dim
    return layers * token_bytes(engine.kv_dtype, device, model.kv_lora_rank, rope)


def _workspace(config: Config, model: ModelConfig, role: Role, attention: bool) -> int:
    """Bytes that a step needs beside weights and pages, by its largest stage.

    Attention: queries, absorbed queries, latents and outputs of every row in two bytes. Experts:
    rows sent and rows computed, in and out (WireRows), and the hidden values of the rows computed.
    Logits: fp32, twice, of the rows that sample.
    """
    engine, unit = config.engine_of(role), config.units[role]
    sampled = engine.max_batch * (1 + engine.draft_tokens)
    rows = max(engine.step_tokens, sampled)
    width, chosen = model.hidden_size, model.num_experts_per_tok
    wire = WireRows(width, chosen, fp8=config.hardware.accelerator != "cpu")
    sent, products = (rows * chosen, rows * chosen) if attention else (0, 0)
    everybody = rows * unit.attention_ranks
    computed = int(UNEVEN * everybody * chosen / unit.holders)
    if config.exchange.mode == "fixed":
        sent = rows * unit.holders if attention else 0
        computed = max(computed, everybody)  # room for the case that all rows come here
    if attention and unit.experts == "dedicated":
        computed = 0
    stages = [
        (sent + computed) * wire.row_bytes
        + (products + computed) * wire.product_bytes
        + computed * model.moe_intermediate_size * 3 * 2
    ]
    if attention:
        head = model.qk_head_dim + model.latent_width + model.kv_lora_rank + model.v_head_dim
        stages.append(rows * model.num_attention_heads * head * 2)
        stages.append(sampled * model.vocab_size * 8)
    residual = rows * width * 8 if attention else 0
    runtime = RUNTIME_GIB.get(config.hardware.accelerator, CUDA_RUNTIME_GIB)
    return int(runtime * GIB) + residual + max(stages)


def problems(config: Config, model: ModelConfig) -> list[str]:
    """One sentence for each reason why this config can not run this model; empty: it can."""
    found = []
    context = config.engine.max_context or model.max_position_embeddings
    if context > model.max_position_embeddings:
        found.append(
            f"engine.max_context is {context}, but the model has {model.max_position_embeddings} "
            "positions (max_position_embeddings)"
        )
    for memory in rank_memories(config, model):
        who = f"{memory.of} {memory.role} rank"
        if memory.role == "attention" and memory.tokens < context:
            found.append(
                f"{who}: cache_gib has room for {memory.tokens:,} tokens, fewer than one context "
                f"of {context:,}; raise it, or lower engine.max_context"
            )
        if memory.missing and memory.limit is not None:
            parts = ", ".join(f"{n} {b / GIB:.1f}" for n, b in memory.parts.items() if b)
            found.append(
                f"{who}: needs {memory.total / GIB:.1f} GiB of {memory.limit / GIB:.1f} ({parts}); "
                "lower cache_gib, step_tokens or max_batch, or spread the experts over more ranks"
            )
    return found
