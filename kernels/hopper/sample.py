"""Drawing tokens without asking the host: temperature, top-k, top-p, min-p, Gumbel noise, argmax.

The noise is a pure function of (seed, position, token id) as in `kernels/sample.py`, which is the
reference. A filter is a cut in a row's order by value, then id: the k-th largest value, or the one
at which the probabilities from above reach p, is found bit by bit, four bits a pass, so nothing is
sorted. Sums run in a fixed order over the row alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rayseek.kernels.hopper.offline import Variant
from rayseek.kernels.sample import Draw, noise_key, signed

CHUNK, SCAN = 4096, 1024
CUT_REGISTERS = 112  # with fewer, and with some more, compilers keep two values in memory


@triton.jit
def _order(x):  # float32 -> int64 in 0..2^32, ascending as the values are
    bits = x.to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits >= 0, bits + 2147483648, -1 - bits)


@triton.jit
def _search(logits, temperature, top, target, ties_cut, ties_share, V, WEIGHTED: tl.constexpr,
            BLOCK: tl.constexpr):  # fmt: skip
    """Largest key c such that what lies at or above it counts (or weighs) at least target."""
    digit = tl.arange(0, 16).to(tl.int64)
    prefix = tl.full((), 0, tl.int64)
    for step in range(8):
        candidate = prefix + (digit << (28 - 4 * step))
        reached = tl.zeros((16,), tl.float32)
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            x = tl.load(logits + v, v < V, other=float("-inf")) / temperature
            key = _order(x)
            weight = tl.where(v < V, 1.0, 0.0)
            if WEIGHTED:
                weight = tl.exp(x - top) * tl.where(key == ties_cut, ties_share, 1.0)
                weight = tl.where(key >= ties_cut, weight, 0.0)
            above = key[:, None] >= candidate[None, :]
            reached += tl.sum(tl.where(above, weight[:, None], 0.0), axis=0)
        best = tl.maximum(tl.sum((reached >= target).to(tl.int64), axis=0) - 1, 0)
        prefix += best << (28 - 4 * step)
    return prefix


@triton.jit
def _above(logits, temperature, top, cut, V, BLOCK: tl.constexpr):
    """Of values above the cut: count and weight; of those at it: count and the weight of one."""
    count, weight, ties, each = 0.0, 0.0, 0.0, 0.0
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        x = tl.load(logits + v, v < V, other=float("-inf")) / temperature
        key = tl.where(v < V, _order(x), -1)
        count += tl.sum((key > cut).to(tl.float32), axis=0)
        weight += tl.sum(tl.where(key > cut, tl.exp(x - top), 0.0), axis=0)
        ties += tl.sum((key == cut).to(tl.float32), axis=0)
        each = tl.maximum(each, tl.max(tl.where(key == cut, tl.exp(x - top), 0.0), axis=0))
    return count, weight, ties, each


@triton.jit
def cut_kernel(logits, stride, numbers, words, cuts, tops, V, BLOCK: tl.constexpr):
    """Per row: [cut, id of the last tie kept]. Rows without a filter keep everything."""
    row = tl.program_id(0)
    temperature = tl.load(numbers + row * 3)
    top_p = tl.load(numbers + row * 3 + 1)
    top_k = tl.load(words + row * 4 + 2)
    logits += row.to(tl.int64) * stride
    top = float("-inf")
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        x = tl.load(logits + v, v < V, other=float("-inf")) / temperature
        top = tl.maximum(top, tl.max(x, axis=0))
    tl.store(tops + row, top)
    cut = tl.full((), -1, tl.int64)
    allowed, share = V + 0.0, 1.0
    if top_k > 0:
        cut = _search(logits, temperature, top, tl.minimum(top_k, V).to(tl.float32), cut, 1.0, V,
                      False, BLOCK)  # fmt: skip
        count, weight, ties, each = _above(logits, temperature, top, cut, V, BLOCK)
        allowed = top_k - count
        share = tl.minimum(allowed / ties, 1.0)
    if top_p < 1.0:
        count, weight, ties, each = _above(logits, temperature, top, cut, V, BLOCK)
        target = top_p * (weight + ties * share * each)
        lower = _search(logits, temperature, top, target, cut, share, V, True, BLOCK)
        count, weight, ties, each = _above(logits, temperature, top, lower, V, BLOCK)
        enough = tl.maximum(tl.ceil((target - weight) / each), 1.0)
        allowed = tl.where(lower > cut, enough, tl.minimum(allowed, enough))
        cut = tl.maximum(cut, lower)
    last = V
    if cut >= 0:
        seen = 0.0
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            x = tl.load(logits + v, v < V, other=float("-inf")) / temperature
            tie = ((_order(x) == cut) & (v < V)).to(tl.float32)
            nth = seen + tl.cumsum(tie, axis=0)
            last = tl.minimum(last, tl.min(tl.where((tie > 0) & (nth >= allowed), v, V), axis=0))
            seen += tl.sum(tie, axis=0)
    tl.store(cuts + row * 2, cut)
    tl.store(cuts + row * 2 + 1, last.to(tl.int64))


@triton.jit
def draw_kernel(
    logits, stride, numbers, words, cuts, tops, best, best_id, V, FILTER: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest of a chunk of logits / temperature + noise, and the lowest id that has it."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    v = chunk * BLOCK + tl.arange(0, BLOCK)
    source = logits + row.to(tl.int64) * stride + v
    x = tl.load(source, v < V, other=float("-inf"))
    temperature = tl.load(numbers + row * 3)
    if tl.load(words + row * 4 + 3) != 0:
        x = x / temperature
        if FILTER:
            cut, last = tl.load(cuts + row * 2), tl.load(cuts + row * 2 + 1)
            key = _order(x)
            kept = (key > cut) | ((key == cut) & (v <= last))
            kept = kept & (tl.exp(x - tl.load(tops + row)) >= tl.load(numbers + row * 3 + 2))
            x = tl.where(kept, x, float("-inf"))
        bits = v.to(tl.uint32) * 0x9E3779B9 + tl.load(words + row * 4).to(tl.uint32, bitcast=True)
        bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
        bits = bits + tl.load(words + row * 4 + 1).to(tl.uint32, bitcast=True)
        bits = (bits ^ (bits >> 15)) * 0x846CA68B
        bits = bits ^ (bits >> 16)
        high, low = (bits >> 16).to(tl.float32), (bits & 0xFFFF).to(tl.float32)
        u = tl.minimum((high * 65536.0 + low + 0.5) * (2.0**-32), 1 - 2.0**-24)
        rest = 1.0 - u
        # log1p(-u): the rounding error of 1 - u is taken out again by the quotient.
        log1p = tl.where(rest == 1.0, -u, tl.log(rest) * (u / (1.0 - rest)))
        x = x - tl.log(-log1p)
    top = tl.max(x, axis=0)
    at = row * tl.num_programs(1) + chunk
    tl.store(best + at, top)
    tl.store(best_id + at, tl.min(tl.where((x == top) & (v < V), v, V - 1), axis=0))


@triton.jit
def pick_kernel(best, best_id, token, chunks, BLOCK: tl.constexpr):
    """The best of a row's chunks."""
    row = tl.program_id(0)
    chunk = tl.arange(0, BLOCK)
    x = tl.load(best + row * chunks + chunk, chunk < chunks, other=float("-inf"))
    ids = tl.load(best_id + row * chunks + chunk, chunk < chunks, other=2147483647)
    tl.store(token + row, tl.min(tl.where(x == tl.max(x, axis=0), ids, 2147483647), axis=0))


class Prepared(NamedTuple):
    """Draws on the device. words: int32 [R, 4] noise key, top_k, whether noise is added."""

    words_R4: Tensor
    numbers_R3: Tensor  # float32 [R, 3] temperature, top_p, min_p
    filtered: bool


def prepare(draws: Sequence[Draw], device: torch.device) -> Prepared:
    """Bring draws to the device without waiting."""
    words: list[tuple[int, int, int, int]] = []
    numbers: list[tuple[float, float, float]] = []
    for d in draws:
        first, second = noise_key(d.seed, d.position)
        words.append((signed(first), signed(second), 0 if d.greedy else d.top_k, not d.greedy))
        numbers.append((1.0, 1.0, 0.0) if d.greedy else (d.temperature, d.top_p, d.min_p))
    return Prepared(
        torch.tensor(words, dtype=torch.int32).to(device, non_blocking=True),
        torch.tensor(numbers).to(device, non_blocking=True),
        any(d.filtered and not d.greedy for d in draws),
    )


def draw(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """As `sample`, with the ids left on the device: int32 [R]. logits float32 [R, V]."""
    return draw_prepared(logits, prepare(draws, logits.device))


def draw_prepared(logits: Tensor, how: Prepared) -> Tensor:
    """The same once the draws are there; launches kernels and nothing else."""
    (rows, vocab), device = logits.shape, logits.device
    words_R4, numbers_R3, filtered = how
    cuts = torch.empty(rows, 2, dtype=torch.int64, device=device)
    tops = torch.empty(rows, device=device)
    if filtered:
        cut_kernel[(rows,)](
            logits, logits.stride(0), numbers_R3, words_R4, cuts, tops, vocab, SCAN, num_warps=8,
            maxnreg=CUT_REGISTERS,
        )  # fmt: skip
    chunks = triton.cdiv(vocab, CHUNK)
    best = torch.empty(rows, chunks, device=device)
    best_id = torch.empty(rows, chunks, dtype=torch.int32, device=device)
    draw_kernel[(rows, chunks)](
        logits, logits.stride(0), numbers_R3, words_R4, cuts, tops, best, best_id, vocab, filtered,
        CHUNK, num_warps=8,
    )  # fmt: skip
    token = torch.empty(rows, dtype=torch.int32, device=device)
    pick_kernel[(rows,)](best, best_id, token, chunks, triton.next_power_of_2(chunks), num_warps=1)
    return token


def variants() -> Iterator[Variant]:
    """For the gate; see `offline.py`."""
    types = {"logits": "*fp32", "numbers": "*fp32", "words": "*i32", "cuts": "*i64",
             "tops": "*fp32", "best": "*fp32", "best_id": "*i32", "token": "*i32"}  # fmt: skip
    yield Variant("sample cut", cut_kernel, types, {"BLOCK": SCAN}, 8,
                  options={"maxnreg": CUT_REGISTERS})  # fmt: skip
    yield Variant("sample pick", pick_kernel, types, {"BLOCK": 32}, 1)
    for filtered in (False, True):
        name = f"sample draw{' filtered' if filtered else ''}"
        yield Variant(name, draw_kernel, types, {"FILTER": filtered, "BLOCK": CHUNK}, 8)
