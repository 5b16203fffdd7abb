"""What the kernel bench measures: every kernel at DeepSeek-V3's shapes.

A case is built when its turn comes, so that only its own tensors are in memory. `error` compares
with the plain reference in float32; `others` are public implementations of the same thing, found at
run time. Bytes are what must cross HBM at least once, operations those of the matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rayseek.kernels.cuda import CudaOps
from rayseek.kernels.fp8 import BLOCK, dequantise_ref, dequantise_rows_ref
from rayseek.kernels.hopper import (
    bench_others,
    bf16_gemm,
    fp8_gemm,
    latent_cache,
    mla_decode,
    mla_prefill,
    permute,
    quantise,
    router,
    sample,
)
from rayseek.kernels.hopper.bench_others import Other
from rayseek.kernels.kv_format import PAGE_TOKENS, token_bytes
from rayseek.kernels.latent_pages import fp8_tokens_ref, read_pages_ref
from rayseek.kernels.mla_attention import mla_attention_ref
from rayseek.kernels.ops import Norm, Weight
from rayseek.kernels.rms_norm import rms_norm_ref
from rayseek.kernels.rope import yarn_cos_sin
from rayseek.kernels.router import route_ref
from rayseek.kernels.sample import Draw, gumbel_noise, keep_mask, noise_key

Peak = Literal["fp8", "bf16", "hbm"]


@dataclass(frozen=True, slots=True)
class Dimensions:
    """Of the model, and the sizes at which it is measured; the defaults are DeepSeek-V3."""

    hidden: int = 7168
    heads: int = 128
    q_lora: int = 1536
    latent: int = 512
    rope: int = 64
    nope: int = 128
    value: int = 128
    dense: int = 18432
    expert: int = 2048
    experts: int = 256
    groups: int = 8
    keep: int = 4
    top_k: int = 8
    vocab: int = 129280
    rows: tuple[int, ...] = (1, 16, 32, 64, 128, 4096)
    contexts: tuple[tuple[int, int], ...] = (
        (1, 4096), (1, 32768), (32, 4096), (64, 4096), (128, 4096), (32, 32768), (128, 1024),
    )  # fmt: skip
    prompts: tuple[tuple[int, int], ...] = ((1024, 1024), (8192, 8192), (1024, 8192))

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """The block-FP8 matrices of a layer, [N, K]."""
        return {
            "q_a+kv_a": (self.q_lora + self.latent + self.rope, self.hidden),
            "q_b": (self.heads * (self.nope + self.rope), self.q_lora),
            "kv_b": (self.heads * (self.nope + self.value), self.latent),
            "o": (self.hidden, self.heads * self.value),
            "shared gate+up": (2 * self.expert, self.hidden),
            "shared down": (self.hidden, self.expert),
            "dense gate+up": (2 * self.dense, self.hidden),
            "dense down": (self.hidden, self.dense),
        }


@dataclass(frozen=True, slots=True)
class Built:
    """One measurement. error: largest against the reference, relative to the largest value."""

    run: Callable[[], object]
    error: Callable[[], float]
    bytes: float
    flops: float
    peak: Peak
    others: dict[str, Other] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Case:
    """kernel: as in the goals; shape: in words."""

    kernel: str
    shape: str
    build: Callable[[], Built]


def relative(actual: Tensor, expected: Tensor) -> float:
    expected = expected.float()
    return float((actual.float() - expected).abs().max() / expected.abs().max())


def cases(d: Dimensions, device: str) -> Iterator[Case]:
    """All cases; `device` "cpu" is for the interpreter and tiny dimensions."""

    def case(kernel: str, shape: str, build: Callable[..., Built], *of: Any) -> Case:
        return Case(kernel, shape, partial(build, *of, device))

    for name, (n, k) in d.matrices.items():
        for rows in d.rows:
            yield case("fp8 gemm", f"{name} {n}x{k}, {rows} rows", _gemm, n, k, rows)
    for rows in d.rows:
        for kernel, n, k in (("head", d.vocab, d.hidden), ("router gate", d.experts, d.hidden)):
            if kernel == "head" and rows > 256:
                continue  # only the last row of a prompt has logits
            yield case("bf16 gemm", f"{kernel} {n}x{k}, {rows} rows", _bf16, n, k, rows)
        yield case("bf16 gemm", f"W_UK of {d.heads} heads, {rows} rows", _absorb, d, rows)
    for experts, each in ((16, 32), (8, 32), (32, 8), (8, d.rows[-1])):
        for what, n, k in (("up", 2 * d.expert, d.hidden), ("down", d.hidden, d.expert)):
            shape = f"{what} {n}x{k}, {experts} experts x {each} rows"
            yield case("grouped fp8", shape, _grouped, experts, each, n, k)
    for batch, context in d.contexts:
        for name, fp8 in (("mla decode", False), ("mla decode fp8", True)):
            yield case(name, f"batch {batch} x {context}", _decode, d, batch, context, fp8)
    for new, total in d.prompts:
        yield case("mla prefill", f"{new} of {total} tokens", _prefill, d, new, total)
    some = d.rows[3 % len(d.rows)]
    for rows in {some, d.rows[-1]}:
        shape = f"{rows} rows"
        yield case("rms_norm + quantise", shape, _norm, d, rows)
        yield case("silu * up + quantise", shape, _silu, d, rows)
        yield case("store_latents", shape, _store, d, rows, False)
        yield case("store_latents fp8", shape, _store, d, rows, True)
        yield case("router", shape, _route, d, rows)
        yield case("expert sort + tiles", shape, _sort, d, rows)
        yield case("expert combine", shape, _combine, d, rows)
    for rows, top_p in ((1, 1.0), (some, 1.0), (some, 0.9)):
        yield case("sampling", f"{rows} rows, top_p {top_p}", _sampling, d, rows, top_p)


def _weights(n: int, k: int, device: str, count: int = 0) -> tuple[Tensor, Tensor]:
    """Random e4m3 bits without NaN, and scales that make products of size 1."""
    shape = (count, n, k) if count else (n, k)
    data = torch.randint(0, 0x70, shape, dtype=torch.uint8, device=device)
    data |= torch.randint(0, 2, shape, dtype=torch.uint8, device=device) << 7
    blocks = (-(-n // BLOCK), -(-k // BLOCK))
    scale = torch.rand((count, *blocks) if count else blocks, device=device) + 0.5
    return data.view(torch.float8_e4m3fn), scale / (100 * k**0.5)


def _gemm(n: int, k: int, rows: int, device: str) -> Built:
    w, w_scale = _weights(n, k, device)
    x, x_scale = quantise.quantise(torch.randn(rows, k, device=device))
    run = partial(fp8_gemm.fp8_matmul, x, x_scale, w, w_scale)

    def error() -> float:
        few = min(rows, 64)
        values = dequantise_rows_ref(x[:few], x_scale[:, :few])
        expected = values @ dequantise_ref(Weight(w, w_scale)).T
        return relative(run()[:few], expected)

    others = bench_others.fp8_products(x, x_scale, w, w_scale)
    moved = n * k + rows * k + 2 * rows * n
    return Built(run, error, moved, 2.0 * rows * n * k, "fp8", others)


def _bf16(n: int, k: int, rows: int, device: str) -> Built:
    w = torch.randn(n, k, device=device).bfloat16()
    x = torch.randn(rows, k, device=device).bfloat16()
    run = partial(bf16_gemm.bf16_matmul, x, w)
    return Built(
        run, lambda: relative(run()[:16], x[:16].float() @ w.float().T),
        2 * n * k + 2 * rows * k + 4 * rows * n, 2.0 * rows * n * k, "bf16",
        {"cuBLAS": lambda: x @ w.T},
    )  # fmt: skip


def _absorb(d: Dimensions, rows: int, device: str) -> Built:
    w = torch.randn(d.heads, d.latent, d.nope, device=device).bfloat16()
    q = torch.randn(rows, d.heads, d.nope, device=device).bfloat16()
    out = q.new_empty(rows, d.heads, d.latent)

    def error() -> float:
        bf16_gemm.bf16_batched(q, w, out)
        return relative(out[:16], torch.einsum("thn,hcn->thc", q[:16].float(), w.float()))

    return Built(
        lambda: bf16_gemm.bf16_batched(q, w, out), error,
        2 * (w.numel() + q.numel() + out.numel()), 2.0 * rows * w.numel(), "bf16",
        {"cuBLAS bmm": lambda: torch.bmm(q.transpose(0, 1), w.transpose(1, 2))},
    )  # fmt: skip


def _grouped(experts: int, each: int, n: int, k: int, device: str) -> Built:
    w, w_scale = _weights(n, k, device, experts)
    rows = experts * each
    x, x_scale = quantise.quantise(torch.randn(rows, k, device=device))
    expert = torch.arange(experts, dtype=torch.int32, device=device).repeat_interleave(each)
    wide = fp8_gemm.can_be_wide(n, k, grouped=True)
    to = permute.assign(expert, experts, 1, fp8_gemm.WIDE_ROWS if wide else 64)
    out = torch.empty(rows, n, dtype=torch.bfloat16, device=device)

    def run() -> None:
        fp8_gemm.grouped_fp8_matmul(x, x_scale, w, w_scale, to.tiles, out)

    def error() -> float:
        run()
        last = dequantise_ref(Weight(w[-1], w_scale[-1]))
        few = slice(rows - min(each, 64), rows)
        return relative(out[few], dequantise_rows_ref(x[few], x_scale[:, few]) @ last.T)

    others = bench_others.grouped_products(x, x_scale, w, w_scale, each)
    return Built(run, error, w.numel() + rows * (k + 2 * n), 2.0 * rows * n * k, "fp8", others)


def _decode(d: Dimensions, batch: int, context: int, fp8: bool, device: str) -> Built:
    per = -(-context // PAGE_TOKENS)
    width = d.latent + d.rope
    plain_pages = torch.randn(batch * per, PAGE_TOKENS, width, device=device).bfloat16()
    pages = plain_pages
    if fp8:
        tokens = plain_pages.float().view(-1, width).split([d.latent, d.rope], dim=1)
        pages = fp8_tokens_ref(*tokens).view(batch * per, PAGE_TOKENS, -1)
    table = torch.randperm(batch * per, device=device).int().view(batch, per)
    sequence = torch.arange(batch, dtype=torch.int32, device=device)
    position = torch.full((batch,), context - 1, dtype=torch.int32, device=device)
    q = torch.randn(batch, d.heads, width, device=device).bfloat16()

    def run(of: slice = slice(None)) -> Tensor:
        return mla_decode.mla_attention(
            q[of], pages, table, sequence[of], position[of], width**-0.5, d.latent
        )

    def error() -> float:
        expected = mla_attention_ref(
            q[:2].float(), read_pages_ref(pages, d.latent, d.rope).float(), table,
            sequence[:2], position[:2], width**-0.5, d.latent,
        )  # fmt: skip
        return relative(run(slice(0, 2)), expected)

    gathered = plain_pages[table.long()].view(batch, -1, width)[:, :context]

    def plain() -> Tensor:
        score = torch.bmm(q, gathered.transpose(1, 2)) * width**-0.5
        return torch.bmm(score.softmax(-1), gathered[..., : d.latent])

    others = bench_others.latent_attention(q, pages, table, position + 1, d.latent, width**-0.5)
    others["cuBLAS bmm"] = plain
    keys = float(batch * context)
    moved = keys * _token(d, fp8) + 2 * batch * d.heads * (width + d.latent)
    return Built(run, error, moved, 2 * keys * d.heads * (width + d.latent), "bf16", others)


def _token(d: Dimensions, fp8: bool) -> float:
    """Bytes of a cached token."""
    return float(token_bytes("fp8" if fp8 else "auto", "cuda", d.latent, d.rope))


def _prefill(d: Dimensions, new: int, total: int, device: str) -> Built:
    q = torch.randn(new, d.heads, d.nope + d.rope, device=device).bfloat16()
    kv = torch.randn(total, d.heads, d.nope + d.value, device=device).bfloat16()
    rope = torch.randn(total, d.rope, device=device).bfloat16()
    scale = (d.nope + d.rope) ** -0.5
    k = torch.cat([kv[..., : d.nope], rope[:, None].expand(-1, d.heads, -1)], dim=-1)
    by_head = [x.transpose(0, 1)[None] for x in (q, k, kv[..., d.nope :])]
    run = partial(mla_prefill.mla_prefill, q, kv, rope, scale)

    def error() -> float:
        last, keys, values = (x[0, :2].float() for x in by_head)
        score = last[:, -16:] @ keys.transpose(1, 2) * scale
        position = torch.arange(total, device=device)
        ahead = position > position[-score.shape[1] :, None]
        expected = score.masked_fill(ahead, -torch.inf).softmax(-1) @ values
        return relative(run()[-16:, :2].transpose(0, 1), expected)

    pairs = new * (total - new) + new * (new + 1) / 2
    others: dict[str, Other] = {}
    if new == total:
        others["SDPA"] = lambda: F.scaled_dot_product_attention(
            by_head[0], by_head[1], by_head[2], is_causal=True, scale=scale
        )
    return Built(
        run, error,
        2.0 * (q.numel() + kv.numel() + rope.numel() + new * d.heads * d.value),
        2 * pairs * d.heads * (d.nope + d.rope + d.value), "bf16", others,
    )  # fmt: skip


def _norm(d: Dimensions, rows: int, device: str) -> Built:
    x, norm = torch.randn(rows, d.hidden, device=device), _norm_of(d.hidden, device)
    run = partial(quantise.rms_norm_quantised, x, norm)
    return Built(
        run, lambda: relative(dequantise_rows_ref(*run()), rms_norm_ref(x, norm)),
        5.0 * x.numel(), 0.0, "hbm",
        {"F.rms_norm alone": lambda: F.rms_norm(x, (d.hidden,), norm.weight_K, 1e-6)},
    )  # fmt: skip


def _norm_of(width: int, device: str) -> Norm:
    return Norm(torch.rand(width, device=device) + 0.5, 1e-6)


def _silu(d: Dimensions, rows: int, device: str) -> Built:
    x = torch.randn(rows, 2 * d.expert, device=device).bfloat16()
    gate, up = x.float().chunk(2, dim=1)
    run = partial(quantise.quantise, x, gated=True)
    return Built(
        run, lambda: relative(dequantise_rows_ref(*run()), F.silu(gate) * up),
        5.0 * rows * d.expert, 0.0, "hbm",
    )  # fmt: skip


def _store(d: Dimensions, rows: int, fp8: bool, device: str) -> Built:
    width = d.latent + d.rope
    x, norm = torch.randn(rows, width, device=device).bfloat16(), _norm_of(d.latent, device)
    ops = CudaOps(device, "fp8" if fp8 else "auto")
    pages = ops.new_pages(-(-rows // PAGE_TOKENS), d.latent, d.rope)
    table = yarn_cos_sin(8192, d.rope, 1e4, 40, 4096).to(device)
    positions = torch.arange(rows, dtype=torch.int32, device=device)

    def run() -> None:
        latent_cache.store_latents(x, norm, table, positions, positions.long(), pages)

    def error() -> float:
        run()
        stored = read_pages_ref(pages, d.latent, d.rope).flatten(0, 1)[:rows, : d.latent]
        return relative(stored, rms_norm_ref(x[:, : d.latent], norm))

    return Built(run, error, 2.0 * x.numel() + rows * _token(d, fp8), 0.0, "hbm")


def _route(d: Dimensions, rows: int, device: str) -> Built:
    logits, bias = torch.randn(rows, d.experts, device=device), torch.zeros(d.experts).to(device)
    how: Any = (logits, bias, d.groups, d.keep, d.top_k, True, 2.5)

    def error() -> float:
        (ids, weights), (same, same_weights) = router.route(*how), route_ref(*how)
        return relative(weights, same_weights) if torch.equal(ids, same) else 1.0

    others: dict[str, Other] = {"torch, op by op": lambda: route_ref(*how)}
    return Built(lambda: router.route(*how), error, 4.0 * logits.numel(), 0.0, "hbm", others)


def _sort(d: Dimensions, rows: int, device: str) -> Built:
    chosen = torch.rand(rows, d.experts, device=device).argsort(dim=1)[:, : d.top_k]
    pairs = chosen.sort(dim=1).values.int().flatten()
    run = partial(permute.assign, pairs, d.experts, d.top_k)

    def error() -> float:
        return float(not torch.equal(run().pair_S.long(), pairs.sort(stable=True).indices))

    others: dict[str, Other] = {"torch.sort": lambda: pairs.sort(stable=True)}
    return Built(run, error, 12.0 * len(pairs), 0.0, "hbm", others)


def _combine(d: Dimensions, rows: int, device: str) -> Built:
    y = torch.randn(rows * d.top_k, d.hidden, device=device).bfloat16()
    weights = torch.rand(rows, d.top_k, device=device)
    into = torch.zeros(rows, d.hidden, device=device)

    def error() -> float:
        fresh = torch.zeros_like(into)
        permute.combine(y, weights, fresh)
        by_row = y.view(rows, d.top_k, -1).float()  # summed in another order
        return relative(fresh, torch.einsum("tkd,tk->td", by_row, weights))

    moved = 2.0 * y.numel() + 8.0 * into.numel()
    return Built(lambda: permute.combine(y, weights, into), error, moved, 0.0, "hbm")


def _sampling(d: Dimensions, rows: int, top_p: float, device: str) -> Built:
    logits = torch.randn(rows, d.vocab, device=device) * 3
    draws = [Draw(0.6, 0, top_p, 0.0, 1, r) for r in range(rows)]
    run = partial(sample.draw_prepared, logits, sample.prepare(draws, logits.device))

    def error() -> float:
        noise = gumbel_noise([noise_key(1, r) for r in range(rows)], d.vocab).to(device)
        scaled = logits / 0.6
        for row in scaled:
            if top_p < 1.0:
                row.masked_fill_(~keep_mask(row, 0, top_p, 0.0), -torch.inf)
        return 1.0 - float(((scaled + noise).argmax(dim=1) == run()).float().mean())

    others: dict[str, Other] = {
        "torch.multinomial": lambda: torch.multinomial((logits / 0.6).softmax(-1), 1)
    }
    return Built(run, error, 4.0 * logits.numel(), 0.0, "hbm", others)
