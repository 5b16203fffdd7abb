"""How fast the operations are here: `rayseek bench --kernels`.

On a Hopper GPU, each kernel at V3's shapes (`hopper/bench.py`). On a CPU, each operation, then
whole decode steps and a prefill composed of them, on a random DeepSeek-V3 architecture small enough
for one core. One thread; best of several repetitions.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayseek.kernels.kv_format import PAGE_TOKENS
from rayseek.kernels.ops import LayerParts, MoeParts, Norm, Ops, Weight
from rayseek.kernels.reference import ReferenceOps
from rayseek.kernels.rope import yarn_cos_sin
from rayseek.kernels.select import choose_ops, device_for

LAYERS, HIDDEN, HEADS, Q_LORA, LATENT, ROPE, NOPE, VALUE = 8, 256, 8, 128, 512, 64, 128, 128
DENSE, EXPERTS, EXPERT, GROUPS, KEEP, TOP_K, VOCAB = 768, 32, 128, 4, 2, 4, 4096
SCALE = 0.1352


def random_weight(n: int, k: int) -> Weight:
    return Weight((torch.randn(n, k) * k**-0.5).bfloat16())


def random_layer(ops: Ops, dense: bool) -> LayerParts:
    inner = DENSE if dense else EXPERT
    kv_b = random_weight(HEADS * (NOPE + VALUE), LATENT)
    w_uk, w_uv = ops.pack_heads(kv_b, HEADS, NOPE, VALUE)
    moe = None
    if not dense:
        gate = ops.pack(Weight(torch.randn(EXPERTS, HIDDEN) * HIDDEN**-0.5))
        experts = ops.pack_experts(
            [[random_weight(EXPERT, HIDDEN) for _ in range(2)] for _ in range(EXPERTS)],
            [random_weight(HIDDEN, EXPERT) for _ in range(EXPERTS)],
        )
        bias = torch.randn(EXPERTS) * 0.1
        moe = MoeParts(gate, bias, GROUPS, KEEP, TOP_K, True, 2.5, experts, rows_E=None)
    return LayerParts(
        input_norm=norm(HIDDEN),
        q_and_kv_a=ops.pack_stack([random_weight(Q_LORA, HIDDEN), random_weight(576, HIDDEN)]),
        q_norm=norm(Q_LORA),
        q_b=ops.pack(random_weight(HEADS * (NOPE + ROPE), Q_LORA)),
        kv_norm=norm(LATENT),
        w_uk=w_uk,
        w_uv=w_uv,
        o=ops.pack(random_weight(HIDDEN, HEADS * VALUE)),
        norm=norm(HIDDEN),
        gate_up=ops.pack_stack([random_weight(inner, HIDDEN), random_weight(inner, HIDDEN)]),
        down=ops.pack(random_weight(HIDDEN, inner)),
        moe=moe,
    )


def norm(width: int) -> Norm:
    return Norm(torch.ones(width), 1e-6)


@dataclass
class Rows:
    """New rows of some sequences that already have `context` tokens each."""

    position: Tensor
    slot: Tensor
    sequence: Tensor
    table: Tensor

    @staticmethod
    def of(sequences: int, new: int, context: int) -> Rows:
        pages = -(-(context + new) // PAGE_TOKENS)
        table = torch.arange(sequences * pages, dtype=torch.int32).view(sequences, pages)
        position = torch.arange(context, context + new)
        pages_N, offset = table.long()[:, position // PAGE_TOKENS], position % PAGE_TOKENS
        return Rows(
            position.repeat(sequences).int(),
            (pages_N * PAGE_TOKENS + offset).flatten(),
            torch.arange(sequences, dtype=torch.int32).repeat_interleave(new),
            table,
        )


class Model:
    """The forward pass of `model`, bare: enough to time what a step costs."""

    def __init__(self, ops: Ops, page_count: int) -> None:
        self.ops = ops
        self.layers = [random_layer(ops, dense=i == 0) for i in range(LAYERS)]
        self.head = ops.pack(random_weight(VOCAB, HIDDEN))
        self.cos_sin = yarn_cos_sin(4096, ROPE, 1e4, 40, 4096)
        self.pages = [ops.new_pages(page_count, LATENT, ROPE) for _ in range(LAYERS)]
        slots = torch.arange(page_count * PAGE_TOKENS)
        for pages, layer in zip(self.pages, self.layers, strict=True):
            ops.store_latents(
                torch.randn(len(slots), LATENT + ROPE), layer.kv_norm, self.cos_sin,
                torch.zeros(len(slots), dtype=torch.int32), slots, pages,
            )  # fmt: skip

    def attend(self, layer: LayerParts, pages: Tensor, x: Tensor, rows: Rows) -> Tensor:
        ops, cos_sin, position = self.ops, self.cos_sin, rows.position
        a = ops.linear(x, layer.q_and_kv_a, layer.input_norm)
        q = ops.linear(a[:, :Q_LORA], layer.q_b, layer.q_norm).view(-1, HEADS, NOPE + ROPE)
        ops.store_latents(a[:, Q_LORA:], layer.kv_norm, cos_sin, position, rows.slot, pages)
        heads = ops.attend(
            q, layer.w_uk, layer.w_uv, cos_sin, pages, rows.table, rows.sequence, position, SCALE
        )
        return ops.linear(heads, layer.o, None, x)

    def forward(self, x: Tensor, rows: Rows, out: Tensor) -> Tensor:
        ops = self.ops
        for layer, pages in zip(self.layers, self.pages, strict=True):
            x = self.attend(layer, pages, x, rows)
            h = ops.rms_norm(x, layer.norm)
            x = x + ops.mlp(h, layer.gate_up, layer.down)
            if layer.moe is not None:
                ids, weights = route(ops, layer.moe, ops.linear(h, layer.moe.gate))
                ops.experts(h, ids, weights, layer.moe.experts, x)
        return ops.linear(x[out], self.head, self.layers[0].norm)


def route(ops: Ops, moe: MoeParts, logits: Tensor) -> tuple[Tensor, Tensor]:
    return ops.route(
        logits, moe.bias_E, moe.groups, moe.keep_groups, moe.top_k, moe.normalise, moe.factor
    )


def best(run: Callable[[], object], seconds: float = 0.4) -> float:
    """The fastest of the runs that fit in the time, in seconds."""
    run()
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while not times or time.perf_counter() < stop:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def time_operations(model: Model, sequences: int, new: int, context: int) -> dict[str, Any]:
    """Each operation of a layer: (run, floating-point operations, bytes it must read)."""
    ops, layer, pages, cos_sin = model.ops, model.layers[1], model.pages[1], model.cos_sin
    moe = layer.moe
    assert moe is not None
    rows = Rows.of(sequences, new, context)
    t = sequences * new
    x, h = torch.randn(t, HIDDEN), torch.randn(t, HIDDEN)
    a = ops.linear(x, layer.q_and_kv_a, layer.input_norm)
    q = ops.linear(a[:, :Q_LORA], layer.q_b, layer.q_norm).view(-1, HEADS, NOPE + ROPE)
    v = torch.randn(t, HEADS * VALUE)
    logits = torch.randn(t, EXPERTS)
    ids, weights = route(ops, moe, logits)
    keys = sum(context + i + 1 for i in range(new)) * sequences
    used = len(ids.unique())
    expert = 3 * HIDDEN * EXPERT

    def of(n: int, k: int, count: int = 1) -> tuple[int, int]:
        return 2 * t * n * k * count, 2 * n * k * count

    linear = partial(partial, ops.linear)
    store = partial(
        ops.store_latents, a[:, Q_LORA:], layer.kv_norm, cos_sin, rows.position, rows.slot, pages
    )
    attend = partial(
        ops.attend, q, layer.w_uk, layer.w_uv, cos_sin, pages, rows.table, rows.sequence,
        rows.position, SCALE,
    )  # fmt: skip
    absorb_flops, absorb_bytes = of(LATENT, NOPE, 2 * HEADS)
    attend_flops = 2 * keys * HEADS * (576 + LATENT) + absorb_flops
    attend_bytes = 4 * 576 * sequences * (context + new) + absorb_bytes
    experts = partial(ops.experts, h, ids, weights, moe.experts, x)
    return {
        "linear qkv_a": (linear(x, layer.q_and_kv_a, layer.input_norm), *of(704, 256)),
        "linear q_b": (linear(a[:, :Q_LORA], layer.q_b, layer.q_norm), *of(1536, 128)),
        "linear o": (linear(v, layer.o, None, x), *of(256, 1024)),
        "linear gate": (linear(h, moe.gate), *of(32, 256)),
        "linear head": (linear(x, model.head, layer.norm), *of(4096, 256)),
        "rms_norm": (partial(ops.rms_norm, x, layer.norm), 4 * t * HIDDEN, 4 * t * HIDDEN),
        "store_latents": (store, 6 * t * 576, 8 * t * 576),
        "attend": (attend, attend_flops, attend_bytes),
        "route": (partial(route, ops, moe, logits), 0, 0),
        "mlp (shared)": (partial(ops.mlp, h, layer.gate_up, layer.down), *of(expert, 1)),
        "experts": (experts, 2 * t * TOP_K * expert, 2 * used * expert),
    }


def report(ours: Model, plain: Model, sequences: int, new: int, context: int) -> None:
    print(f"\n{sequences} sequences, {new} new rows each after {context}")
    print(f"{'operation':16}{'us':>10}{'GFLOP/s':>10}{'GB/s':>8}{'x torch':>9}")
    reference = time_operations(plain, sequences, new, context)
    for name, (run, flops, size) in time_operations(ours, sequences, new, context).items():
        took, other = best(run, 0.1), best(reference[name][0], 0.1)
        rate, bandwidth = flops / took / 1e9, size / took / 1e9
        print(f"{name:16}{took * 1e6:10.1f}{rate:10.1f}{bandwidth:8.1f}{other / took:9.1f}")
    rows, x = Rows.of(sequences, new, context), torch.randn(sequences * new, HIDDEN)
    out = torch.arange(new - 1, sequences * new, new)
    took = best(lambda: ours.forward(x, rows, out), 1.0)
    other = best(lambda: plain.forward(x, rows, out), 1.0)
    rate = len(x) / took
    print(f"whole step: {took * 1e3:.2f} ms, {rate:.0f} tokens/s; torch {other * 1e3:.2f} ms")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    choices = ["auto", "cuda", "native", "reference"]
    parser.add_argument("which", nargs="?", default="auto", choices=choices)
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--only", default="", help="GPU kernels whose name has this in it")
    parser.add_argument("--out", type=Path, help="folder for the GPU's table, plot and figures")
    arguments = parser.parse_args(argv)
    if device_for(arguments.which) == "cuda":
        from rayseek.kernels.hopper import bench

        bench.run(arguments.only, arguments.out)
        return
    torch.manual_seed(0)
    torch.set_num_threads(1)
    choice = choose_ops("cpu", arguments.which, arguments.threads)
    print(choice.reason)
    ours, plain = Model(choice.ops, 128), Model(ReferenceOps(), 128)
    for shape in [(1, 1, 96), (8, 1, 96), (32, 1, 96), (1, 512, 0)]:
        report(ours, plain, *shape)


if __name__ == "__main__":
    main()
