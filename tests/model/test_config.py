"""The official config is read exactly; whatever this engine cannot run is refused by name."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayseek.model.config import ConfigError, ModelConfig, Yarn

OFFICIAL = Path(__file__).with_name("config_671b.json")


def official(**changes: Any) -> dict[str, Any]:
    raw = json.loads(OFFICIAL.read_text()) | changes
    return {key: value for key, value in raw.items() if value is not ...}


def problems_of(raw: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(raw)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


def test_the_official_config() -> None:
    config = ModelConfig.from_pretrained(OFFICIAL)
    assert config.softmax_scale == pytest.approx(0.13523377886, abs=1e-11)
    assert (config.qk_head_dim, config.latent_width) == (192, 576)
    assert config.yarn == Yarn(40.0, 4096, beta_fast=32.0, beta_slow=1.0, mscale=1.0)
    assert config.fp8_blocks
    assert [layer for layer in range(config.stored_layers) if not config.is_moe(layer)] == [0, 1, 2]
    assert config.stored_layers == 62


def test_to_dict_writes_the_official_keys_back() -> None:
    not_needed = (
        "attention_dropout auto_map ep_size initializer_range transformers_version use_cache"
    )
    written = ModelConfig.from_pretrained(OFFICIAL).to_dict()
    assert written == official(**dict.fromkeys(not_needed.split(), ...))


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    size = st.integers(1, 300)
    groups = draw(st.integers(1, 8))
    experts = groups * draw(st.integers(2, 9))
    keep = draw(st.integers(1, groups))
    layers = draw(st.integers(1, 9))
    yarn = st.builds(
        Yarn,
        st.floats(1, 64),
        st.just(4096),
        st.floats(1, 64),
        st.floats(0.5, 1),
        st.floats(0.1, 2),
    )
    return ModelConfig(
        vocab_size=draw(st.integers(2, 10_000)),
        hidden_size=draw(size),
        intermediate_size=draw(size),
        moe_intermediate_size=draw(size),
        num_hidden_layers=layers,
        num_attention_heads=draw(size),
        first_k_dense_replace=draw(st.integers(0, layers)),
        n_routed_experts=experts,
        n_shared_experts=draw(st.integers(1, 3)),
        num_experts_per_tok=draw(st.integers(1, keep * (experts // groups))),
        n_group=groups,
        topk_group=keep,
        norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(st.floats(0.1, 16)),
        q_lora_rank=draw(st.none() | size),
        kv_lora_rank=draw(size),
        qk_nope_head_dim=draw(size),
        qk_rope_head_dim=2 * draw(size),
        v_head_dim=draw(size),
        rms_norm_eps=draw(st.floats(1e-8, 1e-3)),
        rope_theta=draw(st.floats(100, 1e7)),
        max_position_embeddings=draw(st.integers(1, 4096)),
        num_nextn_predict_layers=draw(st.integers(0, 2)),
        yarn=draw(st.none() | yarn),
        fp8_blocks=draw(st.booleans()),
    )


@given(configs())
def test_every_config_survives_its_file(config: ModelConfig) -> None:
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("rope", ["yarn", "default"])
@pytest.mark.parametrize("whole", [True, False], ids=["to_dict", "config.json"])
def test_configs_that_transformers_writes(rope: str, whole: bool, tmp_path: Path) -> None:
    from transformers import DeepseekV3Config

    parameters: dict[str, Any] = {"rope_type": rope, "rope_theta": 5e4}
    if rope == "yarn":
        parameters |= {
            "factor": 8.0, "original_max_position_embeddings": 512, "beta_fast": 32,
            "beta_slow": 1, "mscale": 0.7, "mscale_all_dim": 0.7,
        }  # fmt: skip
    theirs = DeepseekV3Config(rope_parameters=parameters, q_lora_rank=None)
    if whole:
        ours = ModelConfig.from_dict(theirs.to_dict())
    else:
        theirs.save_pretrained(tmp_path)
        ours = ModelConfig.from_pretrained(tmp_path)
    assert ours.rope_theta == 5e4
    assert ours.q_lora_rank is None
    assert ours.num_nextn_predict_layers == 1
    if rope == "yarn":
        assert ours.yarn == Yarn(8.0, 512, 32.0, 1.0, 0.7)
        m = 0.1 * 0.7 * math.log(8) + 1
        assert ours.softmax_scale == pytest.approx(192**-0.5 * m * m)
    else:
        assert ours.yarn is None
        assert ours.softmax_scale == pytest.approx(192**-0.5)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "llama"),
        ("scoring_func", "softmax"),
        ("topk_method", "greedy"),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("tie_word_embeddings", True),
        ("moe_layer_freq", 2),
        ("rope_interleave", False),
        ("hidden_size", 0),
        ("hidden_size", 7168.0),
        ("hidden_size", "7168"),
        ("vocab_size", True),
        ("n_shared_experts", None),
        ("rms_norm_eps", math.nan),
        ("rope_theta", -1),
        ("norm_topk_prob", 1),
        ("eos_token_id", [1, 2]),
        ("kv_lora_rank", ...),
        ("q_lora_rank", 0),
        ("num_key_value_heads", 8),
        ("head_dim", 128),
        ("n_group", 7),
        ("n_group", 256),
        ("topk_group", 9),
        ("num_experts_per_tok", 129),
        ("first_k_dense_replace", 62),
        ("qk_rope_head_dim", 63),
        ("bos_token_id", 129280),
        ("max_position_embeddings", 163841),
        ("rope_scaling", "yarn"),
        ("quantization_config", "fp8"),
        ("quantization_config", {"quant_method": "awq"}),
        ("sliding_window", 4096),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(key: str, value: Any) -> None:
    problems = problems_of(official(**{key: value}))
    assert len(problems) == 1 or key == "n_group"
    assert any(key in problem for problem in problems)
    assert value is ... or any(repr(value) in problem or "awq" in problem for problem in problems)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("rope_scaling", "type", "linear"),
        ("rope_scaling", "type", ["yarn"]),
        ("rope_scaling", "type", ...),
        ("rope_scaling", "mscale", 0.707),
        ("rope_scaling", "mscale_all_dim", ...),
        ("rope_scaling", "factor", ...),
        ("rope_scaling", "truncate", False),
        ("quantization_config", "weight_block_size", [64, 64]),
        ("quantization_config", "fmt", "e5m2"),
        ("quantization_config", "activation_scheme", "static"),
        ("quantization_config", "quant_method", ...),
        ("quantization_config", "ignored_layers", ["lm_head"]),
    ],
)
def test_sections_are_checked_key_by_key(section: str, key: str, value: Any) -> None:
    raw = official()
    raw[section][key] = value
    raw[section] = {k: v for k, v in raw[section].items() if v is not ...}
    (problem,) = problems_of(raw)
    assert f"{section}.{key}" in problem or f"{section}.mscale_all_dim" in problem


def test_every_problem_is_in_one_error() -> None:
    raw = official(
        hidden_size="big", kv_lora_rank=..., scoring_func="softmax", topk_group=9, colour="red"
    )
    text = "\n".join(problems_of(raw))
    for key in ("hidden_size", "kv_lora_rank", "scoring_func", "topk_group", "colour"):
        assert key in text


def test_a_config_made_in_code_is_checked_too() -> None:
    with pytest.raises(ConfigError, match="topk_group"):
        replace(ModelConfig.from_pretrained(OFFICIAL), topk_group=9)


@pytest.mark.parametrize("text", ["", "{", "[]", "\udcff"])
def test_files_that_are_no_config(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="config.json"):
        ModelConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text, "utf-8", errors="surrogateescape")
    with pytest.raises(ConfigError, match="config.json"):
        ModelConfig.from_pretrained(tmp_path)


def test_reading_a_config_needs_no_torch() -> None:
    code = (
        "import rayseek.model.ledger, rayseek.model.small_tokenizer, sys;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
