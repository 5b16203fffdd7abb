"""The official config gives the official checkpoint's table of tensors (spec 1.7 and 4.1)."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayseek.kernels import fp8
from rayseek.model import config as config_module
from rayseek.model.config import ModelConfig
from rayseek.model.inventory import Kind, TensorSpec, inventory, owned_names

OFFICIAL = ModelConfig.from_pretrained(Path(__file__).with_name("config_671b.json"))
SPECS = inventory(OFFICIAL)

E4M3_SHAPES = {  # spec section 4.1: weight, its scales
    "self_attn.q_a_proj": ((1536, 7168), (12, 56)),
    "self_attn.q_b_proj": ((24576, 1536), (192, 12)),
    "self_attn.kv_a_proj_with_mqa": ((576, 7168), (5, 56)),
    "self_attn.kv_b_proj": ((32768, 512), (256, 4)),
    "self_attn.o_proj": ((7168, 16384), (56, 128)),
}
DENSE_SHAPES = {
    "mlp.gate_proj": ((18432, 7168), (144, 56)),
    "mlp.up_proj": ((18432, 7168), (144, 56)),
    "mlp.down_proj": ((7168, 18432), (56, 144)),
}
EXPERT_SHAPES = {
    "gate_proj": ((2048, 7168), (16, 56)),
    "up_proj": ((2048, 7168), (16, 56)),
    "down_proj": ((7168, 2048), (56, 16)),
}
ONCE = {"model.embed_tokens": (129280, 7168), "model.norm": (7168,), "lm_head": (129280, 7168)}
NORMS = {
    "input_layernorm": (7168,),
    "post_attention_layernorm": (7168,),
    "self_attn.q_a_layernorm": (1536,),
    "self_attn.kv_a_layernorm": (512,),
}
MTP = {
    "embed_tokens": (129280, 7168),
    "enorm": (7168,),
    "hnorm": (7168,),
    "eh_proj": (7168, 14336),
    "shared_head.norm": (7168,),
    "shared_head.head": (129280, 7168),
}


def listed() -> dict[str, tuple[tuple[int, ...], str]]:
    """The table of the spec, written out without looking at the code under test."""
    table: dict[str, tuple[tuple[int, ...], str]] = {}

    def quantised(prefix: str, shapes: dict[str, tuple[tuple[int, int], tuple[int, int]]]) -> None:
        for name, (shape, scales) in shapes.items():
            table[f"{prefix}{name}.weight"] = (shape, "F8_E4M3")
            table[f"{prefix}{name}.weight_scale_inv"] = (scales, "F32")

    table |= {f"{name}.weight": (shape, "BF16") for name, shape in ONCE.items()}
    for layer in range(62):
        at = f"model.layers.{layer}."
        table |= {f"{at}{name}.weight": (shape, "BF16") for name, shape in NORMS.items()}
        quantised(at, E4M3_SHAPES)
        if layer < 3:
            quantised(at, DENSE_SHAPES)
            continue
        table[f"{at}mlp.gate.weight"] = ((256, 7168), "BF16")
        table[f"{at}mlp.gate.e_score_correction_bias"] = ((256,), "F32")
        quantised(f"{at}mlp.shared_experts.", EXPERT_SHAPES)
        for expert in range(256):
            quantised(f"{at}mlp.experts.{expert}.", EXPERT_SHAPES)
    table |= {f"model.layers.61.{n}.weight": (shape, "BF16") for n, shape in MTP.items()}
    return table


def test_names_shapes_and_dtypes_of_the_671b_checkpoint() -> None:
    assert {name: (spec.shape, spec.dtype) for name, spec in SPECS.items()} == listed()


def test_totals_of_the_671b_checkpoint() -> None:
    assert len(SPECS) == 91_991
    assert sum(spec.bytes for spec in SPECS.values()) == 688_574_839_360
    by_dtype: Counter[str] = Counter()
    for spec in SPECS.values():
        by_dtype[spec.dtype] += spec.bytes
    assert by_dtype == {"F8_E4M3": 680_571_043_840, "BF16": 7_837_573_120, "F32": 166_222_400}
    mtp = {n: s for n, s in SPECS.items() if s.layer == 61}
    assert len(mtp) == 1564
    assert sum(spec.bytes for spec in mtp.values()) == 15_424_227_552


def parameters(specs: dict[str, TensorSpec]) -> int:
    return sum(s.elements for name, s in specs.items() if not name.endswith("_scale_inv"))


def test_parameter_counts() -> None:
    mtp = {n: s for n, s in SPECS.items() if s.layer == 61}
    unique = {n: s for n, s in mtp.items() if s.kind != Kind.MTP_COPY}
    assert parameters(SPECS) - parameters(mtp) == 671_026_419_200
    assert parameters(mtp) == 13_463_426_304
    assert parameters(unique) == 11_610_068_224
    main = [(n, s) for n, s in SPECS.items() if s.layer != 61 and not n.endswith("_scale_inv")]
    active = sum(
        s.elements // (32 if s.kind == Kind.ROUTED_EXPERT else 1)  # 8 of 256 experts
        for n, s in main
        if s.kind not in (Kind.EMBEDDING, Kind.NORM) and "e_score" not in n
    )
    assert active == 36_624_596_992


def test_a_bfloat16_checkpoint_has_no_scales() -> None:
    specs = inventory(replace(OFFICIAL, fp8_blocks=False))
    assert not [name for name in specs if name.endswith("_scale_inv")]
    assert {spec.dtype for name, spec in specs.items() if "e_score" not in name} == {"BF16"}
    assert parameters(specs) == parameters(SPECS)


def test_queries_without_a_latent() -> None:
    specs = inventory(replace(OFFICIAL, q_lora_rank=None))
    names = {name.split("self_attn.")[1] for name in specs if "layers.0.self_attn.q" in name}
    assert names == {"q_proj.weight", "q_proj.weight_scale_inv"}
    assert specs["model.layers.0.self_attn.q_proj.weight"].shape == (24576, 7168)


def test_the_block_is_the_kernels_block() -> None:
    assert config_module.BLOCK == fp8.BLOCK


@given(st.integers(1, 32), st.sets(st.integers(3, 6)), st.integers(0, 31))
def test_ranks_share_the_experts_and_nothing_else(ranks: int, layers: set[int], rank: int) -> None:
    mine = set(range(rank % ranks, 32, ranks))
    config = replace(OFFICIAL, num_hidden_layers=6, n_routed_experts=32)
    names = owned_names(config, dict.fromkeys(layers, mine))
    assert len(names) == len(set(names))
    everything = set(owned_names(config))
    routed = {name for name in everything if ".experts." in name}
    wanted = {
        name
        for name in routed
        if int(name.split(".")[2]) in layers and int(name.split(".")[5]) in mine
    }
    assert set(names) == everything - routed | wanted


def test_by_default_a_rank_loads_all_but_the_copies() -> None:
    left = SPECS.keys() - owned_names(OFFICIAL)
    assert left == {
        "model.layers.61.embed_tokens.weight",
        "model.layers.61.shared_head.head.weight",
    }


def test_no_experts_means_none() -> None:
    assert not [name for name in owned_names(OFFICIAL, {}) if ".experts." in name]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.embed_tokens.weight", Kind.EMBEDDING),
        ("lm_head.weight", Kind.HEAD),
        ("model.norm.weight", Kind.NORM),
        ("model.layers.0.self_attn.o_proj.weight_scale_inv", Kind.ATTENTION),
        ("model.layers.2.mlp.up_proj.weight", Kind.DENSE_MLP),
        ("model.layers.3.mlp.gate.e_score_correction_bias", Kind.ROUTER),
        ("model.layers.3.mlp.shared_experts.up_proj.weight", Kind.SHARED_EXPERT),
        ("model.layers.61.mlp.experts.7.up_proj.weight", Kind.ROUTED_EXPERT),
        ("model.layers.61.eh_proj.weight", Kind.MTP_PROJECTION),
        ("model.layers.61.shared_head.norm.weight", Kind.NORM),
        ("model.layers.61.shared_head.head.weight", Kind.MTP_COPY),
    ],
)
def test_kinds(name: str, kind: Kind) -> None:
    assert SPECS[name].kind == kind
