"""The model's dimensions, read from the official `config.json` and written back to it.

Owns which keys and values are accepted. Field names are Hugging Face's; the rest of the code
derives everything else from the properties here (spec section 1).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

BLOCK = 128  # side of a block that shares one FP8 scale (spec section 4.2)


class ConfigError(ValueError):
    """A config that cannot be run; `problems` has one line for each key that is wrong."""

    def __init__(self, source: str, problems: list[str]) -> None:
        super().__init__(f"{source}: {len(problems)} problem(s)\n  " + "\n  ".join(problems))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Yarn:
    """YaRN's stretch of the rotary frequencies (spec section 1.4), on at every context length.

    `mscale` stands for both of the file's `mscale` and `mscale_all_dim`: they must be equal, so
    that cos and sin stay unscaled.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    mscale: float


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A DeepSeek-V3 model. Raises ConfigError when the values contradict each other."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    first_k_dense_replace: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    q_lora_rank: int | None  # None: queries come straight from the hidden state
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    bos_token_id: int = 0
    eos_token_id: int = 1
    num_nextn_predict_layers: int = 0  # MTP modules, stored as the layers after the last
    yarn: Yarn | None = None
    fp8_blocks: bool = False  # weights in e4m3 with one scale for each 128x128 block

    def __post_init__(self) -> None:
        if problems := _contradictions({f.name: getattr(self, f.name) for f in fields(self)}):
            raise ConfigError("model config", problems)

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_width(self) -> int:
        """Values cached for one token in one layer: latent and rotated key, C + R."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def shared_intermediate_size(self) -> int:
        """Hidden width of the shared experts, which are stored as one MLP."""
        return self.n_shared_experts * self.moe_intermediate_size

    @property
    def softmax_scale(self) -> float:
        """Factor of the attention scores: 0.13523377886 for the 671B model (spec 1.4)."""
        scale = 1.0 / math.sqrt(self.qk_head_dim)
        if self.yarn is None or self.yarn.factor <= 1:
            return scale
        m = 0.1 * self.yarn.mscale * math.log(self.yarn.factor) + 1.0
        return scale * m * m

    @property
    def stored_layers(self) -> int:
        """Decoder layers in the checkpoint: the main model's, then the MTP modules'."""
        return self.num_hidden_layers + self.num_nextn_predict_layers

    def is_moe(self, layer: int) -> bool:
        return layer >= self.first_k_dense_replace

    @staticmethod
    def from_pretrained(path: str | Path) -> ModelConfig:
        """From a `config.json`, or the one in a checkpoint's folder."""
        file = Path(path)
        if file.is_dir():
            file = file / "config.json"
        try:
            raw = json.loads(file.read_text("utf-8"))
        except FileNotFoundError:
            raise ConfigError(str(file), ["no such file: a checkpoint needs config.json"]) from None
        except ValueError as error:
            raise ConfigError(str(file), [f"not JSON: {error}"]) from None
        if not isinstance(raw, dict):
            raise ConfigError(str(file), [f"expected a JSON object, found {type(raw).__name__}"])
        return ModelConfig.from_dict(raw, source=str(file))

    @staticmethod
    def from_dict(raw: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
        """From the official keys, or the ones that transformers 5 writes.

        Raises ConfigError listing every unknown key, unsupported value and contradiction.
        """
        reader = _Reader(dict(raw))
        values = reader.model()
        problems = reader.problems + _contradictions(values)
        if problems:
            raise ConfigError(source, problems)
        return ModelConfig(**values)

    def to_dict(self) -> dict[str, Any]:
        """The official `config.json`: the keys an engine needs, sorted as DeepSeek sorts them."""
        raw = asdict(self) | _FIXED
        raw |= {
            "architectures": ["DeepseekV3ForCausalLM"],
            "num_key_value_heads": self.num_attention_heads,
            "torch_dtype": "bfloat16",
        }
        del raw["yarn"], raw["fp8_blocks"], raw["rope_interleave"]
        if self.yarn is not None:
            raw["rope_scaling"] = asdict(self.yarn) | {
                "mscale_all_dim": self.yarn.mscale,
                "type": "yarn",
            }
        if self.fp8_blocks:
            raw["quantization_config"] = dict(_FP8)
        return dict(sorted(raw.items()))


_FIXED: dict[str, Any] = {  # keys with the one value that this engine computes
    "model_type": "deepseek_v3",
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "rope_interleave": True,
}
_FP8: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}
_IGNORED = {  # about training, or about how transformers runs it
    "_name_or_path", "architectures", "attention_dropout", "auto_map", "aux_loss_alpha",
    "chunk_size_feed_forward", "dtype", "ep_size", "id2label", "initializer_range",
    "is_encoder_decoder", "label2id", "output_attentions", "output_hidden_states",
    "output_router_logits", "pad_token_id", "pretraining_tp", "problem_type", "return_dict",
    "seq_aux", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
_MAY_BE_ZERO = "first_k_dense_replace num_nextn_predict_layers bos_token_id eos_token_id"
_RULES: list[tuple[str, Callable[..., bool], str]] = [
    # keys, what must hold of their values, what is expected of the first
    ("first_k_dense_replace num_hidden_layers", lambda k, n: k <= n, "at most num_hidden_layers"),
    ("n_routed_experts n_group", lambda e, g: e % g == 0 and e // g >= 2,
     "a multiple of n_group, with at least two experts a group"),
    ("topk_group n_group", lambda keep, g: keep <= g, "at most n_group"),
    ("num_experts_per_tok topk_group n_routed_experts n_group",
     lambda k, keep, e, g: k <= keep * (e // g), "at most the experts in topk_group groups"),
    ("qk_rope_head_dim", lambda r: r % 2 == 0, "an even number: dimensions turn in pairs"),
    ("bos_token_id vocab_size", lambda token, vocab: token < vocab, "below vocab_size"),
    ("eos_token_id vocab_size", lambda token, vocab: token < vocab, "below vocab_size"),
    ("max_position_embeddings yarn",
     lambda n, yarn: yarn is None or n <= yarn.factor * yarn.original_max_position_embeddings,
     "at most factor x original_max_position_embeddings of rope_scaling"),
]  # fmt: skip


def _contradictions(values: Mapping[str, Any]) -> list[str]:
    """Rules that do not hold, among those whose keys were all read."""
    problems = []
    for keys, holds, expected in _RULES:
        names = keys.split()
        if all(n in values for n in names) and not holds(*(values[n] for n in names)):
            found = ", ".join(f"{n}={values[n]!r}" for n in names)
            problems.append(f"{names[0]}: expected {expected}; found {found}")
    return problems


class _Reader:
    """Takes the keys out of a raw config one by one and notes what is wrong with them."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw = raw
        self.problems: list[str] = []

    def model(self) -> dict[str, Any]:
        """The fields of ModelConfig that could be read; whatever remains in `raw` is unknown."""
        for key, only in _FIXED.items():
            self.fixed(self.raw, key, only)
        values: dict[str, Any] = {"fp8_blocks": self.fp8()}
        self.yarn(values)
        for field in fields(ModelConfig):
            if field.name in values or field.name == "yarn":
                continue
            optional = "None" in str(field.type) or field.name == "num_nextn_predict_layers"
            if optional and self.raw.get(field.name) is None:
                self.raw.pop(field.name, None)
                continue
            self.take(self.raw, field.name, str(field.type).split(" ")[0], values)
        values.setdefault("q_lora_rank", None)
        self.derived(values)
        for key in sorted(self.raw.keys() - _IGNORED):
            self.problems.append(f"unknown key {key!r} = {self.raw[key]!r}")
        return values

    def take(
        self, raw: dict[str, Any], key: str, kind: str, into: dict[str, Any], where: str = ""
    ) -> None:
        """Move raw[key] into `into` if it is a `kind`: int, float or bool, in range."""
        if key not in raw:
            self.problems.append(f"missing key '{where}{key}'")
            return
        value = raw.pop(key)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if kind == "bool":
            good, expected = isinstance(value, bool), "true or false"
        elif kind == "int":
            low = 0 if key in _MAY_BE_ZERO.split() else 1
            good, expected = type(value) is int and value >= low, f"an integer of {low} or more"
        else:
            good, expected = number and 0 < value < math.inf, "a positive number"
            value = float(value) if good else value
        if good:
            into[key] = value
        else:
            self.problems.append(f"{where}{key}: expected {expected}; found {value!r}")

    def fixed(self, raw: dict[str, Any], key: str, only: object, where: str = "") -> None:
        """raw[key] may be absent; otherwise it has the one supported value."""
        value = raw.pop(key, only)
        if value != only or isinstance(value, bool) != isinstance(only, bool):
            self.problems.append(f"{where}{key}: only {only!r} is supported; found {value!r}")

    def fp8(self) -> bool:
        quantization = self.raw.pop("quantization_config", None)
        if quantization is None:
            return False
        where = "quantization_config."
        if not isinstance(quantization, dict):
            self.problems.append(f"quantization_config: expected an object; found {quantization!r}")
            return False
        quantization = dict(quantization)
        if "quant_method" not in quantization:
            self.problems.append(f"missing key '{where}quant_method'")
        for key, only in _FP8.items():
            self.fixed(quantization, key, only, where)
        self.unknown(quantization, where)
        return True

    def yarn(self, values: dict[str, Any]) -> None:
        """`rope_scaling`, or transformers' `rope_parameters`, which also holds rope_theta."""
        key = "rope_parameters" if self.raw.get("rope_parameters") else "rope_scaling"
        rope = self.raw.pop(key, None)
        self.raw.pop("rope_parameters", None)
        if rope is None:
            return
        if not isinstance(rope, dict):
            self.problems.append(f"{key}: expected an object or null; found {rope!r}")
            return
        rope, where = dict(rope), f"{key}."
        if "rope_theta" in rope:
            self.raw["rope_theta"] = rope.pop("rope_theta")
        kinds = [rope.pop(k) for k in ("type", "rope_type") if k in rope]
        if kinds and all(kind == "yarn" for kind in kinds):
            found: dict[str, Any] = {}
            for field in fields(Yarn):
                self.take(rope, field.name, str(field.type), found, where)
            if rope.pop("mscale_all_dim", None) != found.get("mscale", math.nan):
                self.problems.append(f"{where}mscale_all_dim: expected the same value as mscale")
            if len(found) == len(fields(Yarn)):
                values["yarn"] = Yarn(**found)
        elif not kinds or any(kind != "default" for kind in kinds):
            self.problems.append(f"{where}type: expected 'yarn' or 'default'; found {kinds!r}")
            rope.clear()
        self.unknown(rope, where)

    def derived(self, values: dict[str, Any]) -> None:
        """Keys that repeat others must agree with them."""
        sums = {
            "num_key_value_heads": ("num_attention_heads",),
            "head_dim": ("qk_rope_head_dim",),
            "qk_head_dim": ("qk_nope_head_dim", "qk_rope_head_dim"),
        }
        for key, parts in sums.items():
            expected = sum(values.get(part, math.nan) for part in parts)
            value = self.raw.pop(key, None)
            if value is not None and not math.isnan(expected) and value != expected:
                self.problems.append(
                    f"{key}: expected {' + '.join(parts)} = {expected}; found {value!r}"
                )

    def unknown(self, rest: dict[str, Any], where: str) -> None:
        self.problems += [f"unknown key '{where}{key}' = {rest[key]!r}" for key in sorted(rest)]
