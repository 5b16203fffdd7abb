"""RMSNorm, and activations as e4m3 with one scale per row and 128 columns.

Scales lie group-major, [K/128, T]: a matmul's tile of rows reads them as one contiguous piece.
References: `rms_norm_ref`, `quantise_rows_ref`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from rayseek.kernels.fp8 import BLOCK
from rayseek.kernels.hopper.offline import Variant
from rayseek.kernels.ops import Norm

GROUPS = 8  # of one program of the element-wise kernels
NORM_WARPS = 8


@triton.jit
def _as_e4m3(x):  # [G, 128] float32 -> e4m3, scales [G]
    amax = tl.max(tl.abs(x), axis=1)
    scale = tl.where(amax > 2.0**-100, amax / 448.0, 1.0)  # as `LEAST` of fp8.py
    return (x / scale[:, None]).to(tl.float8e4nv), scale


@triton.jit
def quantise_kernel(
    x, out, scale, rows_used, T, K, stride_x, GATED: tl.constexpr, LIMITED: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Rows of x, or silu(x[:, :K]) * x[:, K:] if GATED, as e4m3 [T, K] and scales [K/128, T].

    LIMITED: only the first rows_used[0] rows.
    """
    row = tl.program_id(0)
    if LIMITED and row >= tl.load(rows_used):
        return
    group = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = column < K
    source = x + row.to(tl.int64) * stride_x + column
    value = tl.load(source, inside, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(source + K, inside, other=0.0).to(tl.float32)
        value = value * tl.sigmoid(value) * up
    data, s = _as_e4m3(value)
    tl.store(out + row.to(tl.int64) * K + column, data, inside)
    tl.store(scale + group * T + row, s, group * 128 < K)


@triton.jit
def rms_norm_kernel(
    x, weight, out, scale, eps, T, K, stride_x, QUANTISE: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """RMSNorm of whole rows: e4m3 and scales if QUANTISE, else in the dtype of out."""
    row = tl.program_id(0)
    group = tl.arange(0, BLOCK_G)
    column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = column < K
    value = tl.load(x + row.to(tl.int64) * stride_x + column, inside, other=0.0).to(tl.float32)
    mean = tl.sum(tl.sum(value * value, axis=1), axis=0) / K
    value = value * tl.rsqrt(mean + eps) * tl.load(weight + column, inside, other=0.0)
    target = out + row.to(tl.int64) * K + column
    if QUANTISE:
        data, s = _as_e4m3(value)
        tl.store(target, data, inside)
        tl.store(scale + group * T + row, s, group * 128 < K)
    else:
        tl.store(target, value.to(out.dtype.element_ty), inside)


def quantise(
    x: Tensor, gated: bool = False, rows_used: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x [T, K] (or [T, 2K] if gated: silu(left) * right) as e4m3 [T, K], scales [K/128, T].

    rows_used: int32 [1] on the device; later rows are left as they are.
    """
    rows, k = x.shape[0], x.shape[1] // 2 if gated else x.shape[1]
    groups = -(-k // BLOCK)
    out = torch.empty(rows, k, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(groups, rows, device=x.device)
    if rows:
        quantise_kernel[(rows, triton.cdiv(groups, GROUPS))](
            x, out, scale, rows_used, rows, k, x.stride(0), gated, rows_used is not None, GROUPS,
            num_warps=4,
        )  # fmt: skip
    return out, scale


def to_words(data: Tensor, scale: Tensor) -> Tensor:
    """Quantised rows [T, K], [K/128, T] as int32 [T, K/4 + K/128]: each row's bytes, its scales."""
    return torch.cat([data.view(torch.int32), scale.T.contiguous().view(torch.int32)], 1)


def from_words(words: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The opposite. words may be a slice of wider rows."""
    data, scale = words[:, : k // 4].contiguous(), words[:, k // 4 :].T.contiguous()
    return data.view(torch.float8_e4m3fn), scale.view(torch.float32)


def rms_norm(x: Tensor, norm: Norm, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """norm(x) in bfloat16 or float32, [T, K]."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    _norm(x, norm, out, None)
    return out


def rms_norm_quantised(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """norm(x) as e4m3 [T, K], scales [K/128, T]."""
    rows, k = x.shape
    out = torch.empty(rows, k, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(-(-k // BLOCK), rows, device=x.device)
    _norm(x, norm, out, scale)
    return out, scale


def _norm(x: Tensor, norm: Norm, out: Tensor, scale: Tensor | None) -> None:
    rows, k = x.shape
    if rows:
        rms_norm_kernel[(rows,)](
            x, norm.weight_K, out, scale, norm.eps, rows, k, x.stride(0), scale is not None,
            triton.next_power_of_2(-(-k // BLOCK)), num_warps=NORM_WARPS,
        )  # fmt: skip


def variants() -> Iterator[Variant]:
    """For the gate; see `offline.py`."""
    for source in ("fp32", "bf16"):
        types = {"x": f"*{source}", "out": "*fp8e4nv", "scale": "*fp32", "weight": "*fp32",
                 "rows_used": "*i32", "eps": "fp32"}  # fmt: skip
        for groups in (16, 64) if source == "fp32" else (16,):
            name = f"rms_norm_quantised {source} {groups * 128}"
            constants = {"QUANTISE": True, "BLOCK_G": groups}
            yield Variant(name, rms_norm_kernel, types, constants, NORM_WARPS, unaligned=("T",))
        plain = {"QUANTISE": False, "BLOCK_G": 64}
        yield Variant(f"rms_norm {source}", rms_norm_kernel, types | {"out": "*bf16"}, plain,
                      NORM_WARPS, unaligned=("T",))  # fmt: skip
        for gated, limited in ((False, False), (True, False), (True, True)):
            if gated and source == "fp32":
                continue
            constants = {"GATED": gated, "LIMITED": limited, "BLOCK_G": GROUPS}
            name = f"quantise {source}{' silu' * gated}{' some' * limited}"
            yield Variant(name, quantise_kernel, types, constants, 4, unaligned=("T",))
