"""MLA over expanded keys and values (192 and 128 wide), for long prompts with a cached prefix.

A program takes 128 new rows of one head and walks the keys of their sequence up to its own last
row. It costs 3.4 times fewer operations per pair than the absorbed form. The keys come as two
parts: per head (N), from kv_b, and shared by all heads (R), as it lies in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from rayseek.kernels.hopper.mla_decode import meet
from rayseek.kernels.hopper.offline import Variant

ROWS, KEYS, WARPS, STAGES = 128, 64, 8, 2


@triton.jit
def prefill_kernel(
    q, kv, key_rope, out, T, S, H, scale_log2, N: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """q [T, H, N+R], kv [S, H, N+V], key_rope [S, R]; row t is at position S - T + t."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    head = tl.program_id(1)
    t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    n, r, v, s = tl.arange(0, N), tl.arange(0, R), tl.arange(0, V), tl.arange(0, BLOCK_S)
    q_at = q + (t.to(tl.int64) * H + head)[:, None] * (N + R)
    q_nope = tl.load(q_at + n[None, :], t[:, None] < T, other=0.0)
    q_rope = tl.load(q_at + N + r[None, :], t[:, None] < T, other=0.0)
    position = S - T + t
    highest = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    result = tl.zeros((BLOCK_T, V), tl.float32)
    for start in range(0, min(S - T + (tile + 1) * BLOCK_T, S), BLOCK_S):
        key = (start + s).to(tl.int64)
        there = key < S
        kv_at = kv + (key * H + head) * (N + V)
        k_nope = tl.load(kv_at[None, :] + n[:, None], there[None, :], other=0.0)
        k_rope = tl.load(key_rope + key[None, :] * R + r[:, None], there[None, :], other=0.0)
        value = tl.load(kv_at[:, None] + N + v[None, :], there[:, None], other=0.0)
        score = tl.dot(q_nope, k_nope)
        score = tl.dot(q_rope, k_rope, score) * scale_log2
        score = tl.where((start + s)[None, :] <= position[:, None], score, float("-inf"))
        highest, total, result = meet(score, value, highest, total, result)
    target = out + (t.to(tl.int64) * H + head)[:, None] * V + v[None, :]
    result = result / total[:, None]
    tl.store(target, result.to(out.dtype.element_ty), t[:, None] < T)


def mla_prefill(q: Tensor, kv: Tensor, key_rope: Tensor, scale: float) -> Tensor:
    """Causal attention of the last T of S tokens of one sequence -> [T, H, V], bfloat16.

    q [T, H, N+R] with its rotary part rotated; kv [S, H, N+V]: keys without position, values;
    key_rope [S, R] rotated, contiguous. All bfloat16.
    """
    (rows, heads, width), keys, rope = q.shape, kv.shape[0], key_rope.shape[1]
    nope = width - rope
    out = torch.empty(rows, heads, kv.shape[2] - nope, dtype=q.dtype, device=q.device)
    if rows:
        prefill_kernel[(triton.cdiv(rows, ROWS), heads)](
            q, kv, key_rope, out, rows, keys, heads, scale * 1.4426950408889634, nope, rope,
            kv.shape[2] - nope, ROWS, KEYS, num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
    return out


def variants() -> Iterator[Variant]:
    """For the gate; see `offline.py`."""
    types = {"q": "*bf16", "kv": "*bf16", "key_rope": "*bf16", "out": "*bf16", "scale_log2": "fp32"}
    sizes = {"N": 128, "R": 64, "V": 128, "BLOCK_T": ROWS, "BLOCK_S": KEYS}
    yield Variant("mla_prefill", prefill_kernel, types, sizes, WARPS, STAGES, wgmma=True,
                  unaligned=("T", "S"))  # fmt: skip
