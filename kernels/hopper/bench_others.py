"""Public implementations beside which the bench measures ours, those that are installed.

Each function gives what a case calls and times, by name; what plans ahead has done it. An
implementation that refuses a shape says so in its place of the table.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

Other = Callable[[], object]


def add(others: dict[str, Other], label: str, module: str, plan: Callable[[Any], Other]) -> None:
    """Add `plan(module)` under this label, if there is such a module."""
    try:
        found = importlib.import_module(module)
    except ImportError:
        return
    try:
        others[label] = plan(found)
    except Exception as problem:  # a stranger's: its words go into the table
        others[label] = partial(_refuse, problem)


def _refuse(problem: Exception) -> None:
    raise problem


def fp8_products(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor) -> dict[str, Other]:
    """x [T, K], w [N, K] in e4m3; scales [K/128, T] and [N/128, K/128]."""
    others: dict[str, Other] = {
        "torch._scaled_mm": lambda: torch._scaled_mm(
            x, w.T, scale_a=x_scale.T, scale_b=w_scale.T, out_dtype=torch.bfloat16
        )
    }
    out = torch.empty(len(x), len(w), dtype=torch.bfloat16, device=x.device)
    rows = x_scale.T  # columns first in memory, as it wants them

    def plan(deep_gemm: Any) -> Other:
        return lambda: deep_gemm.fp8_gemm_nt((x, rows), (w, w_scale), out)

    add(others, "DeepGEMM", "deep_gemm", plan)
    return others


def grouped_products(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, each: int
) -> dict[str, Other]:
    """w [E, N, K], and `each` rows of x for each expert; otherwise as above."""
    experts, n, k = w.shape
    rows, device = experts * each, x.device
    ends = (torch.arange(experts, device=device, dtype=torch.int32) + 1) * each
    ones, each_n = torch.ones(rows, device=device), torch.ones(experts, n, device=device)
    x16, w16 = x.bfloat16(), w.bfloat16()
    others: dict[str, Other] = {
        "torch._scaled_grouped_mm": lambda: torch._scaled_grouped_mm(
            x, w.transpose(1, 2), ones, each_n, offs=ends, out_dtype=torch.bfloat16
        ),
        "torch._grouped_mm, bf16": lambda: torch._grouped_mm(x16, w16.transpose(1, 2), offs=ends),
    }
    out = torch.empty(rows, n, dtype=torch.bfloat16, device=device)

    def contiguous(deep_gemm: Any) -> Other:
        of = torch.arange(experts, device=device, dtype=torch.int32).repeat_interleave(each)
        return lambda: deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
            (x, x_scale.T), (w, w_scale), out, of
        )

    def masked(deep_gemm: Any) -> Other:
        data, scale = x.view(experts, each, k), x_scale.T.contiguous().view(experts, each, -1)
        counts = torch.full((experts,), each, dtype=torch.int32, device=device)
        return lambda: deep_gemm.m_grouped_fp8_gemm_nt_masked(
            (data, scale), (w, w_scale), out.view(experts, each, n), counts, each
        )

    add(others, "DeepGEMM", "deep_gemm", masked if each % 128 else contiguous)
    return others


def latent_attention(
    q: Tensor, pages: Tensor, table: Tensor, lengths: Tensor, latent: int, scale: float
) -> dict[str, Other]:
    """One row a sequence: q [B, H, X], pages bfloat16 [P, 64, X] or FP8, lengths int32 [B]."""
    batch, heads, width = q.shape
    others: dict[str, Other] = {}

    def flash_mla(module: Any) -> Other:
        tiles, splits = module.get_mla_metadata(lengths, heads, 1)
        return lambda: module.flash_mla_with_kvcache(
            q[:, None], pages[:, :, None], table, lengths, latent, tiles, splits, scale, False
        )

    def flashinfer(module: Any) -> Other:
        room = torch.empty(128 << 20, dtype=torch.int8, device=q.device)
        wrapper = module.BatchMLAPagedAttentionWrapper(room)
        begins = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
        wrapper.plan(
            begins, begins * table.shape[1], table.flatten(), lengths, heads, latent,
            width - latent, pages.shape[1], False, scale, q.dtype, pages.dtype,
        )  # fmt: skip
        parts = *q.split([latent, width - latent], -1), *pages.split([latent, width - latent], -1)
        return lambda: wrapper.run(*parts)

    if (
        pages.dtype is not torch.uint8
    ):  # theirs of FP8 pages are for sparse attention, or of another layout
        add(others, "FlashMLA", "flash_mla", flash_mla)
        add(others, "FlashInfer", "flashinfer.mla", flashinfer)
    return others
