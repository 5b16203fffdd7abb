"""`rayseek bench --slice N`: the engine's passes on one GPU at V3's true dimensions, with N layers.

One dense layer and N - 1 with experts, random block-FP8 weights made on the GPU. Two slices are
timed, N layers and 1 fewer, so that what a layer with experts costs is their difference and
embedding, head and launch are not counted in it. Decoding is timed kernel by kernel, as it runs on
every rank whose experts are spread over others, and as CUDA graphs, as it does where all are here.
The whole model is then reckoned as

    61 layers = slice + 2 * (dense layer) + (58 - experts' layers in the slice) * (experts' layer)

A dense layer reads as much as nine experts do, so it is taken to cost what one with experts costs
times the ratio of their floors. A floor is the time of the least bytes at the measured memory rate,
or of the operations at the measured tensor rates.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from rayseek.kernels.cuda import CudaOps
from rayseek.kernels.fp8 import BLOCK
from rayseek.kernels.hopper.bench import Ceilings, Clock, ceilings
from rayseek.kernels.kv_format import KVDtype, token_bytes
from rayseek.kernels.ops import Weight
from rayseek.model.batch import PAGE_TOKENS, Batch
from rayseek.model.cached_model import CachedModel
from rayseek.model.config import ModelConfig
from rayseek.model.inventory import inventory
from rayseek.model.latent_cache import LatentCache
from rayseek.model.transformer import Transformer

BATCHES = (1, 8, 32, 64, 128, 256)
CONTEXTS = (1024, 4096, 32768)
PROMPTS = (1024, 4096)
CACHE_SHARE = 0.8  # of the memory that the weights leave


class RandomWeights:
    """What `Weights` gives, made up on the device when it is asked for."""

    def __init__(self, config: ModelConfig, device: str) -> None:
        self.specs, self.device = inventory(config), device

    def tensor(self, name: str) -> Tensor:
        shape = self.specs[name].shape
        if len(shape) == 1:
            return torch.rand(shape, device=self.device) + 0.5
        values: Tensor = torch.randn(shape, device=self.device) * shape[-1] ** -0.5
        return values.bfloat16()

    def weight(self, name: str) -> Weight:
        spec = self.specs[name]
        if spec.dtype != "F8_E4M3":
            return Weight(self.tensor(name))
        n, k = spec.shape
        bits = torch.randint(0, 0x70, (n, k), dtype=torch.uint8, device=self.device)
        bits |= torch.randint(0, 2, (n, k), dtype=torch.uint8, device=self.device) << 7
        scale = torch.full((-(-n // BLOCK), -(-k // BLOCK)), 0.01 * k**-0.5, device=self.device)
        return Weight(bits.view(torch.float8_e4m3fn), scale)


@dataclass(frozen=True, slots=True)
class Floor:
    """Least bytes and operations of a pass, and the time that they take at the ceilings."""

    bytes: float
    fp8_flops: float
    bf16_flops: float

    def seconds(self, top: Ceilings) -> float:
        compute = self.fp8_flops / top.fp8 + self.bf16_flops / top.bf16
        return max(self.bytes / top.hbm, compute)


def layer_floor(
    c: ModelConfig, moe: bool, rows: int, keys: int, cached: int, kv_dtype: KVDtype = "auto"
) -> Floor:
    """Of one layer: rows new tokens, keys seen by all of them together, cached tokens read.

    Experts that no row is likely to meet are not read: of E, E * (1 - (1 - K/E)^rows) are.
    """
    h, heads = c.hidden_size, c.num_attention_heads
    q_lora = c.q_lora_rank or h
    projections = (
        h * (q_lora + c.latent_width)
        + q_lora * heads * c.qk_head_dim
        + heads * c.v_head_dim * h
    )  # fmt: skip
    absorbed = heads * c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim)
    token = token_bytes(kv_dtype, "cuda", c.kv_lora_rank, c.qk_rope_head_dim)
    core = 2.0 * keys * heads * (c.latent_width + c.kv_lora_rank)
    if moe:
        expert = 3 * h * c.moe_intermediate_size
        hit = c.n_routed_experts * (1 - (1 - c.num_experts_per_tok / c.n_routed_experts) ** rows)
        read = expert * (hit + c.n_shared_experts) + 2 * h * c.n_routed_experts
        used = expert * (c.num_experts_per_tok + c.n_shared_experts)
    else:
        read = used = 3 * h * c.intermediate_size
    return Floor(
        projections + 2 * absorbed + read + float(cached * token),
        2.0 * rows * (projections + used),
        2.0 * rows * absorbed + core,
    )


def slice_floor(
    c: ModelConfig, rows: int, keys: int, cached: int, out: int, kv_dtype: KVDtype = "auto"
) -> Floor:
    """Of all layers of the config, and the head for `out` rows."""
    layers = [
        layer_floor(c, c.is_moe(layer), rows, keys, cached, kv_dtype)
        for layer in range(c.num_hidden_layers)
    ]
    head = c.vocab_size * c.hidden_size
    return Floor(
        sum(f.bytes for f in layers) + 2.0 * head,
        sum(f.fp8_flops for f in layers),
        sum(f.bf16_flops for f in layers) + 2.0 * out * head,
    )


def whole_model_s(
    slice_s: float, moe_layer_s: float, dense_layer_s: float, config: ModelConfig,
    whole: ModelConfig,
) -> float:  # fmt: skip
    """The formula of the module's docstring. slice_s: of `config`."""
    dense = config.first_k_dense_replace
    moe = config.num_hidden_layers - dense
    more_dense = whole.first_k_dense_replace - dense
    more_moe = whole.num_hidden_layers - whole.first_k_dense_replace - moe
    return slice_s + more_dense * dense_layer_s + more_moe * moe_layer_s


def formula(config: ModelConfig, whole: ModelConfig) -> str:
    """What `whole_model_s` reckons, with its numbers."""
    dense = whole.first_k_dense_replace - config.first_k_dense_replace
    moe = whole.num_hidden_layers - config.num_hidden_layers - dense
    return (
        f"{whole.num_hidden_layers} layers = slice of {config.num_hidden_layers} + {moe} x (layer "
        f"with experts) + {dense} x (dense layer). Layer with experts: this slice less one of "
        f"{config.num_hidden_layers - 1} layers; dense layer: that times the ratio of their floors."
    )


def decode_batch(sequences: int, context: int) -> Batch:
    """One new token of each sequence at position context - 1, pages side by side."""
    each = -(-context // PAGE_TOKENS)
    tables = [list(range(s * each, (s + 1) * each)) for s in range(sequences)]
    return Batch.of_sequences(
        [[s + 3] for s in range(sequences)], [context - 1] * sequences, tables
    )


def sliced(whole: ModelConfig, layers: int) -> ModelConfig:
    """V3 with one dense layer and so many in all."""
    if layers < 3:
        raise ValueError(f"a slice of {layers} layers: it needs 3 or more, one dense, two not")
    return replace(
        whole, num_hidden_layers=layers, first_k_dense_replace=1, num_nextn_predict_layers=0
    )


def _model(config: ModelConfig, kv_dtype: KVDtype, graphs: bool) -> CachedModel:
    """Random weights, and as many pages as fit beside them."""
    weights, ops = RandomWeights(config, "cuda"), CudaOps(kv_dtype=kv_dtype)
    model = Transformer(config, weights, ops, max(CONTEXTS))  # type: ignore[arg-type]
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    page = LatentCache.page_bytes(config, device="cuda", kv_dtype=kv_dtype)
    return CachedModel(model, int(free * CACHE_SHARE / page), graphs=graphs)


def _times(
    config: ModelConfig, clock: Clock, kv_dtype: KVDtype, graphs: bool
) -> dict[tuple[str, int, int], float]:
    """Seconds of each pass that fits: ("decode", batch, context) and ("prefill", rows, 0); of
    ("decode, graphs", batch, context) with graphs."""
    model, times = _model(config, kv_dtype, graphs), dict[tuple[str, int, int], float]()
    pages = model.cache.num_pages - 1
    for context in CONTEXTS:
        for sequences in BATCHES:
            if sequences * -(-context // PAGE_TOKENS) <= pages:
                batch = decode_batch(sequences, context)
                seconds = clock.seconds(partial(model.forward, batch), graph=False)
                times["decode, graphs" if graphs else "decode", sequences, context] = seconds
    for rows in () if graphs else PROMPTS:
        if -(-rows // PAGE_TOKENS) <= pages:
            table = [list(range(-(-rows // PAGE_TOKENS)))]
            batch = Batch.of_sequences([[3] * rows], [0], table, [1])
            times["prefill", rows, 0] = clock.seconds(partial(model.forward, batch), graph=False)
    return times


@torch.inference_mode()
def run(whole: ModelConfig, layers: int, kv_dtype: KVDtype = "auto") -> None:
    """Time the slice and print it beside its floor and the reckoning for the whole model."""
    config, shorter = sliced(whole, layers), sliced(whole, layers - 1)
    clock = Clock()
    top = ceilings(clock)
    started = time.perf_counter()
    less, times = dict[tuple[str, int, int], float](), dict[tuple[str, int, int], float]()
    for graphs in (False, True):
        for of, found in ((shorter, less), (config, times)):
            found |= _times(of, clock, kv_dtype, graphs)
            torch.cuda.empty_cache()
    print(report(config, whole, times, less, top, kv_dtype))
    print(formula(config, whole))
    print(f"measured in {time.perf_counter() - started:.0f} s on {top.device}")


def report(
    config: ModelConfig,
    whole: ModelConfig,
    times: Mapping[tuple[str, int, int], float],
    less: Mapping[tuple[str, int, int], float],
    top: Ceilings,
    kv_dtype: KVDtype = "auto",
) -> str:
    """The table, as Markdown. less: times of a slice with one layer of experts fewer."""
    layers = whole.num_hidden_layers
    lines = [
        f"| pass | slice ms | floor ms | x floor | ms per layer with experts | {layers} layers, ms "
        "| tokens/s |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for (kind, count, context), took in times.items():
        decode = kind != "prefill"
        keys = count * context if decode else count * (count + 1) // 2
        cached = count * context if decode else count
        out = count if decode else 1
        floor = slice_floor(config, count, keys, cached, out, kv_dtype).seconds(top)
        one = max(took - less[kind, count, context], 0.0)
        dense, moe = (
            layer_floor(config, x, count, keys, cached, kv_dtype).seconds(top)
            for x in (False, True)
        )
        all_s = whole_model_s(took, one, one * dense / moe, config, whole)
        name = f"{kind} {count} x {context}" if decode else f"prefill {count}"
        lines.append(
            f"| {name} | {took * 1e3:.3f} | {floor * 1e3:.3f} | {took / floor:.2f} | "
            f"{one * 1e3:.3f} | {all_s * 1e3:.2f} | {count / all_s:.0f} |"
        )
    return "\n".join(lines)
