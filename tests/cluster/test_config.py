"""The config of a split system: what it refuses, what it fits, and what it would start."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from rayseek.cluster.config import Config, ConfigFileError, Role, load_config, shipped_configs
from rayseek.cluster.fit import problems, rank_memories
from rayseek.cluster.layout import UNIT_NAMES, layout
from rayseek.cluster.placement import make_placement
from rayseek.model.config import ModelConfig
from rayseek.model.maker import SMALL
from rayseek.model.official import DEEPSEEK_V3

OFFICIAL = ModelConfig.from_pretrained(Path(__file__).parents[1] / "model" / "config_671b.json")
REAL = [name for name in shipped_configs() if not name.startswith(("laptop", "cpu"))]


def test_the_spec_is_the_official_config() -> None:
    assert DEEPSEEK_V3 == OFFICIAL


# ---- files ----


def test_shipped_configs() -> None:
    assert shipped_configs() == [
        "cpu-smoke", "h200-8", "h800-16", "h800-cell-18", "laptop", "laptop-split"
    ]  # fmt: skip
    assert load_config("laptop") == Config()


def test_a_file_wins_over_a_name_only_by_its_ending(tmp_path: Path) -> None:
    (tmp_path / "laptop.yaml").write_text("decode: {units: 3}")
    assert load_config(str(tmp_path / "laptop.yaml")).decode.units == 3
    with pytest.raises(ConfigFileError, match="neither a .yaml file nor one of cpu-smoke, h200-8"):
        load_config("desktop")


def test_every_problem_of_a_file_is_told_with_its_key(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("decode: {replicas: 3}\nprefill: {experts: dedicated}\n")
    with pytest.raises(ConfigFileError) as seen:
        load_config(file)
    said = str(seen.value).splitlines()[1:]
    assert "  decode.replicas: unknown key" in said and len(said) == 2
    assert "  prefill: experts are dedicated, so expert_ranks must be 1 or more" in said


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"decode": {"replicas": 2}}, "Extra inputs"),
        ({"decode": {"units": 0}}, "greater than or equal to 1"),
        ({"decode": {"experts": "dedicated"}}, "expert_ranks must be 1 or more"),
        ({"decode": {"expert_ranks": 2}}, "are for dedicated experts"),
        ({"prefill": {"spares": 1}}, "are for dedicated experts"),
        ({"decode": {"redundant_experts": 4}}, "one rank holds all experts"),
        ({"exchange": {"micro_batches": 3}}, "less than or equal to 2"),
        ({"exchange": {"mode": "fast"}}, "'auto', 'exact' or 'fixed'"),
        ({"hardware": {"accelerator": "B200"}}, "'cpu', 'H100', 'H200' or 'H800'"),
        ({"hardware": {"accelerator": "H100"}, "decode": {"attention_ranks": 12}}, "as 8 would"),
        ({"decode": {"step_tokens": 100}}, "100 in decode units"),
        ({"prefill": {"units": 1, "step_tokens": 100}}, "100 in prefill units"),
    ],
)
def test_contradictions_are_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Config.model_validate(data)


def test_an_engine_takes_what_its_role_says() -> None:
    config = Config.model_validate(
        {"engine": {"max_batch": 8, "cache_gib": 2}, "prefill": {"units": 1, "cache_gib": 1}}
    )
    assert config.engine_of("decode") == config.engine
    assert config.engine_of("prefill") == config.engine.model_copy(update={"cache_gib": 1.0})


# ---- memory ----


@pytest.mark.parametrize("name", REAL)
def test_shipped_configs_fit_the_671b_model_and_no_smaller_machine(name: str) -> None:
    config = load_config(name)
    assert problems(config, OFFICIAL) == []
    for memory in rank_memories(config, OFFICIAL):
        assert memory.limit is not None and memory.total > 0.8 * memory.limit, "memory lies idle"
    largest = max(memory.total for memory in rank_memories(config, OFFICIAL))
    for gib, fits in ((largest / 2**30 + 0.01, True), (largest / 2**30 - 0.01, False)):
        hardware = config.hardware.model_copy(update={"memory_gib": gib})
        found = problems(config.model_copy(update={"hardware": hardware}), OFFICIAL)
        assert (found == []) == fits
    assert "needs" in found[0] and "experts" in found[0] and "lower cache_gib" in found[0]


@pytest.mark.parametrize("name", ["laptop", "laptop-split"])
def test_laptop_configs_fit_the_small_model(name: str) -> None:
    assert problems(load_config(name), SMALL) == []


@pytest.mark.parametrize(
    ("ranks", "redundant", "gigabytes"),
    [(8, 0, 100.8), (16, 0, 60.0), (32, 32, 42.1), (64, 0, 29.3), (144, 32, 24.2), (320, 64, 21.6)],
)
def test_weights_of_a_rank(ranks: int, redundant: int, gigabytes: float) -> None:
    """Spec section 1.7."""
    decode = {"attention_ranks": ranks, "redundant_experts": redundant}
    (memory,) = rank_memories(Config.model_validate({"decode": decode}), OFFICIAL)
    names = ("attention, dense, head", "shared expert", "experts")
    assert round(sum(memory.parts[name] for name in names) / 1e9, 1) == gigabytes


def test_dedicated_ranks_share_what_a_colocated_one_holds() -> None:
    decode = {"attention_ranks": 16, "experts": "dedicated", "expert_ranks": 32}
    attention, expert = rank_memories(Config.model_validate({"decode": decode}), OFFICIAL)
    (colocated,) = rank_memories(
        Config.model_validate({"decode": {"attention_ranks": 32}}), OFFICIAL
    )
    assert attention.parts["experts"] == 0
    for name in ("experts", "MTP"):
        assert attention.parts[name] + expert.parts[name] == colocated.parts[name]
    for name in ("attention, dense, head", "shared expert"):
        assert attention.parts[name] == colocated.parts[name]


def test_contexts_must_fit() -> None:
    long = Config.model_validate({"engine": {"max_context": 200_000}})
    assert "has 163840 positions" in problems(long, OFFICIAL)[0]
    short = Config.model_validate({"engine": {"max_context": 65536}})
    assert "fewer than one context of 65,536" in problems(short, OFFICIAL)[0]


# ---- layout ----


@st.composite
def units(draw: st.DrawFn, fewest: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "units": draw(st.integers(fewest, 3)),
        "attention_ranks": draw(st.sampled_from([1, 2, 3, 4, 8, 12])),
    }
    if draw(st.booleans()):
        found |= {"experts": "dedicated", "expert_ranks": draw(st.integers(1, 5))}
        found["spares"] = draw(st.integers(0, 2))
    if found.get("expert_ranks", found["attention_ranks"]) > 1:
        found["redundant_experts"] = draw(st.integers(0, 9))
    return found


@st.composite
def configs(draw: st.DrawFn) -> Config:
    return Config.model_validate(
        {
            "prefill": draw(units(0)),
            "decode": draw(units(1)),
            "hardware": {
                "accelerator": draw(st.sampled_from(["cpu", "H100"])),
                "per_node": draw(st.sampled_from([4, 12])),
            },
        }
    )


@settings(max_examples=200)
@given(configs())
def test_laws_of_a_layout(config: Config) -> None:
    plan = layout(config, SMALL, "/model", "127.0.0.1")
    gpu, per_node = config.hardware.accelerator != "cpu", config.hardware.per_node
    assert per_node is not None
    of_node = Counter(place.node for place in plan.places)
    assert max(of_node.values()) <= per_node and plan.nodes == max(of_node) + 1
    if gpu:
        seats = [(place.node, place.device) for place in plan.places]
        assert len(set(seats)) == len(seats) and {device for _, device in seats} <= {
            *range(per_node)
        }
    for role, unit in config.units.items():
        deployment = plan[UNIT_NAMES[role]]
        spec = deployment.unit
        assert spec is not None and spec.rank == deployment.rank
        assert deployment.replicas == unit.units
        assert len(deployment.places) == unit.units * unit.attention_ranks
        assert len(spec.bundles) == spec.wanted.attention == unit.attention_ranks
        assert spec.rank.settings == config.engine_of(role)
        assert spec.rank.alone == (unit.attention_ranks == 1 and unit.experts == "colocated")
        _check_bundles(config, role, deployment)
        _check_slots(config, role, plan)
    dedicated = [r for r, unit in config.units.items() if unit.experts == "dedicated"]
    names = [deployment.name for deployment in plan.deployments]
    assert names == [*(UNIT_NAMES[r] for r in config.units), *(["Experts"] * bool(dedicated)),
                     "Ingress"]  # fmt: skip
    if dedicated:
        experts = plan["Experts"]
        assert experts.replicas == len(experts.places)
        assert experts.handles == tuple(UNIT_NAMES[role] for role in dedicated)
        assert len(experts.bundles) == 1 and experts.bundles[0].get("GPU", 0) == gpu


def _check_bundles(config: Config, role: Role, deployment: Any) -> None:
    """One bundle a node, holding its ranks; the leader is in the first."""
    unit, bundles = config.units[role], deployment.bundles
    ranks = Counter(deployment.unit.bundles)
    gpu = config.hardware.accelerator != "cpu"
    assert sorted(ranks) == [*range(len(bundles))]
    assert [b.get("GPU", 0) for b in bundles] == [gpu * ranks[i] for i in range(len(bundles))]
    assert (deployment.strategy == "STRICT_SPREAD") == (len(bundles) > 1)
    cpus = [bundle["CPU"] / ranks[i] for i, bundle in enumerate(bundles)]
    assert all(cpu == cpus[-1] for cpu in cpus[1:])
    if len(bundles) > 1:
        assert bundles[0]["CPU"] == pytest.approx(bundles[1]["CPU"] + deployment.replica_cpus)
    for number in range(unit.units):
        places = [place for place in deployment.places if place.unit == number]
        assert [place.index for place in places] == [*range(unit.attention_ranks)]
        node = dict(zip(deployment.unit.bundles, [p.node for p in places], strict=True))
        assert len(set(node.values())) == len(bundles), "a bundle is a node"
        assert all(node[b] == p.node for b, p in zip(deployment.unit.bundles, places, strict=True))


def _check_slots(config: Config, role: Role, plan: Any) -> None:
    """Ranks hold as many experts as the placement of their unit will give them."""
    unit = config.units[role]
    placement = make_placement(
        {1: [1.0] * SMALL.n_routed_experts}, (0,) * unit.holders, unit.redundant_experts
    )
    for number in range(unit.units):
        places = [p for p in plan.places if (p.of, p.unit) == (role, number)]
        holders = [place for place in places if place.slots]
        assert len(holders) == unit.holders
        assert {place.slots for place in holders} == {placement.slots_per_holder}
        assert sum(place.spare for place in places) == unit.spares
        assert not any(place.spare for place in holders)


def test_deepseeks_cell() -> None:
    plan = layout(load_config("h800-cell-18"), OFFICIAL)
    assert plan.nodes == 30 and len(plan.places) == 240
    prefill, decode = plan["Prefill"], plan["Decode"]
    assert {p.slots for p in prefill.places} == {9} and {p.slots for p in decode.places} == {2}
    assert sum(p.slots for p in decode.places) == 288
    assert [p.node for p in decode.places] == [12 + rank // 8 for rank in range(144)]
    assert decode.bundles == ({"GPU": 8, "CPU": 65}, *({"GPU": 8, "CPU": 64},) * 17)
    assert prefill.strategy == "STRICT_SPREAD" and decode.unit is not None
    assert decode.unit.wanted.layers == tuple(range(3, 62))
    assert prefill.unit is not None and prefill.unit.rank.streams > 22 + 144 * 2
    assert decode.unit.rank.streams > 22 * 1.25


def test_laptop_split() -> None:
    plan = layout(load_config("laptop-split"), SMALL)
    assert [(d.name, d.replicas) for d in plan.deployments] == [
        ("Prefill", 1), ("Decode", 1), ("Experts", 2), ("Ingress", 1)
    ]  # fmt: skip
    assert [p.slots for p in plan.places] == [16, 0, 8, 8]
    assert plan.nodes == 1


@pytest.mark.parametrize("accelerator, auto", [("H200", 1152), ("cpu", 2304)])
def test_fp8_latents_leave_room_for_more_tokens(accelerator: str, auto: int) -> None:
    def tokens(kv_dtype: str) -> int:
        engine = {"cache_gib": 8, "kv_dtype": kv_dtype, "draft_tokens": 1}
        config = {"engine": engine, "hardware": {"accelerator": accelerator}}
        (memory,) = rank_memories(Config.model_validate(config), OFFICIAL)
        return memory.tokens

    assert tokens("auto") == 8 * 2**30 // (62 * auto)
    assert tokens("fp8") == 8 * 2**30 // (62 * 656)
