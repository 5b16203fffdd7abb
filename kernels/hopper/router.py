"""The router in one launch: sigmoid, bias, groups by their best two, top experts, weights.

One program a row. Equal scores go to the lower id, as in the reference: `route_ref`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from rayseek.kernels.hopper.offline import Variant
from rayseek.kernels.router import TINY


@triton.jit
def route_kernel(
    logits, bias, ids, weights, stride, factor, tiny, E: tl.constexpr, GROUPS: tl.constexpr,
    KEEP: tl.constexpr, TOP_K: tl.constexpr, NORMALISE: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    size: tl.constexpr = E // GROUPS
    group = tl.arange(0, BLOCK_G)
    member = tl.arange(0, BLOCK_S)
    expert = group[:, None] * size + member[None, :]
    inside = (group[:, None] < GROUPS) & (member[None, :] < size)
    lowest = float("-inf")
    logit = tl.load(logits + row.to(tl.int64) * stride + expert, inside, other=0.0)
    score = 1.0 / (1.0 + tl.exp(-logit.to(tl.float32)))
    biased = score + tl.load(bias + expert, inside, other=0.0)
    # A score that is not a number counts as lowest, so that every row has its K experts.
    biased = tl.where(inside & (biased == biased), biased, lowest)  # noqa: PLR0124

    best = tl.max(biased, axis=1)
    first = tl.min(tl.where(biased == best[:, None], member[None, :], BLOCK_S), axis=1)
    others = tl.where(member[None, :] == first[:, None], lowest, biased)
    rank = tl.where(group < GROUPS, best + (tl.max(others, axis=1) if size > 1 else 0.0), lowest)
    kept = group < 0
    for _ in tl.static_range(KEEP):
        top = tl.max(rank, axis=0)
        chosen = tl.min(tl.where((rank == top) & ~kept, group, BLOCK_G), axis=0)
        kept = kept | (group == chosen)
        rank = tl.where(kept, lowest, rank)

    # A group outside may not be chosen even where every score is -inf: mask by value and by index.
    left = tl.where(kept[:, None], biased, lowest)
    allowed = kept[:, None] & inside
    for _ in tl.static_range(TOP_K):
        top = tl.max(tl.max(left, axis=1), axis=0)
        candidate = tl.where((left == top) & allowed, expert, E)
        chosen_expert = tl.min(tl.min(candidate, axis=1), axis=0)
        allowed = allowed & (expert != chosen_expert)
        left = tl.where(allowed, left, lowest)
    picked = kept[:, None] & inside & ~allowed
    weight = tl.where(picked, score, 0.0)
    if NORMALISE:
        weight = weight / (tl.sum(tl.sum(weight, axis=1), axis=0) + tiny)

    # Ascending: an expert's place is the number of picked ones before it.
    flag = picked.to(tl.int32)
    in_group = tl.sum(flag, axis=1)
    place = tl.cumsum(flag, axis=1) - 1 + (tl.cumsum(in_group, axis=0) - in_group)[:, None]
    target = row.to(tl.int64) * TOP_K + place
    tl.store(ids + target, expert, picked)
    tl.store(weights + target, weight * factor, picked)


def route(
    logits: Tensor, bias: Tensor, groups: int, keep_groups: int, top_k: int, normalise: bool,
    factor: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `route_ref`: expert ids int32 [T, K] ascending, float32 weights [T, K]."""
    rows, experts = logits.shape
    if experts % groups or keep_groups > groups or top_k > keep_groups * experts // groups:
        raise ValueError(
            f"cannot choose {top_k} of {experts} experts in {keep_groups} of {groups} groups"
        )
    ids = torch.empty(rows, top_k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(rows, top_k, device=logits.device)
    if rows:
        route_kernel[(rows,)](
            logits, bias, ids, weights, logits.stride(0), factor, TINY, experts, groups,
            keep_groups, top_k, normalise, triton.next_power_of_2(groups),
            triton.next_power_of_2(experts // groups), num_warps=1,
        )  # fmt: skip
    return ids, weights


def variants() -> Iterator[Variant]:
    """For the gate; see `offline.py`."""
    types = {"logits": "*fp32", "bias": "*fp32", "ids": "*i32", "weights": "*fp32",
             "factor": "fp32", "tiny": "fp32"}  # fmt: skip
    v3 = {"E": 256, "GROUPS": 8, "KEEP": 4, "TOP_K": 8, "NORMALISE": True, "BLOCK_G": 8,
          "BLOCK_S": 32}  # fmt: skip
    yield Variant("route", route_kernel, types, v3, 1)
