"""`NativeOps`: every operation in C++ on one CPU, batch invariant, float32 throughout.

Each method checks and converts as little as it can: at batch 1 a call is a few microseconds, and
a step makes about a hundred. Inputs that are not float32 with contiguous rows are copied; index
values are trusted to be in range, as the model that makes them guarantees.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

import torch
from torch import Tensor

from rayseek.kernels.kv_format import PAGE_TOKENS, Fp8Token, KVDtype
from rayseek.kernels.latent_pages import read_pages_ref
from rayseek.kernels.native_build import load_native
from rayseek.kernels.native_pass import NativePass
from rayseek.kernels.native_weights import (
    NativeExperts,
    NativeWeight,
    pack_latent_heads,
    pack_matrix,
)
from rayseek.kernels.ops import Norm, PassParts, Weight


class NativeOps:
    """`Ops` in C++ (`native.cpp`).

    threads: how many may share a call with much work, such as a long prompt. Results never
    depend on it. kv_dtype: of the latent cache. Raises NativeUnavailableError where the library
    cannot be had.
    """

    name = "native"
    fp8_rows = False

    def __init__(
        self, threads: int = 1, target: str = "native", kv_dtype: KVDtype = "auto"
    ) -> None:
        self.kv_dtype = kv_dtype
        self.library, self.amx = load_native(target)
        self.library.rs_set_threads(threads)
        self._narrow = bool(self.library.rs_narrow())

    def pack(self, weight: Weight) -> NativeWeight:
        return pack_matrix([weight], self._narrow)

    def pack_stack(self, weights: list[Weight]) -> NativeWeight:
        return pack_matrix(weights, self._narrow)

    def pack_heads(
        self, kv_b: Weight, heads: int, nope: int, value: int
    ) -> tuple[NativeWeight, NativeWeight]:
        return pack_latent_heads(kv_b, heads, nope, value, self._narrow)

    def pack_experts(self, gate_up: list[list[Weight]], down: list[Weight]) -> NativeExperts:
        return NativeExperts(
            [pack_matrix(x, self._narrow) for x in gate_up],
            [pack_matrix([x], self._narrow) for x in down],
        )

    def linear(
        self,
        x_TK: Tensor,
        w: NativeWeight,
        norm: Norm | None = None,
        residual_TN: Tensor | None = None,
    ) -> Tensor:
        x = _rows(x_TK, w.k)
        rows = x.shape[0]
        out = torch.empty(rows, w.n)
        weight, eps = (None, 0.0) if norm is None else (norm.weight_K.data_ptr(), norm.eps)
        residual, stride = None, 0
        if residual_TN is not None:
            residual_TN = _rows(residual_TN, w.n)
            residual, stride = residual_TN.data_ptr(), residual_TN.stride(0)
        self.library.rs_linear(
            x.data_ptr(), x.stride(0), rows, w.address, weight, eps, residual, stride,
            out.data_ptr(),
        )  # fmt: skip
        return out

    def rms_norm(self, x_TD: Tensor, norm: Norm) -> Tensor:
        x = _rows(x_TD, norm.weight_K.shape[0])
        out = torch.empty(x.shape)
        self.library.rs_rms_norm(
            x.data_ptr(), x.stride(0), x.shape[0], x.shape[1], norm.weight_K.data_ptr(), norm.eps,
            out.data_ptr(),
        )  # fmt: skip
        return out

    def new_pages(self, count: int, latent: int, rope: int) -> Tensor:
        shape, dtype = _page(latent, rope, self.kv_dtype == "fp8")
        # Zeros that take memory, and the time to get it, when they are first written.
        memory = mmap(-1, count * math.prod(shape) * dtype.itemsize, MAP_PRIVATE | MAP_ANONYMOUS)
        pages = torch.frombuffer(memory, dtype=dtype).view(count, *shape)
        self.library.rs_prefer_huge(pages.data_ptr(), pages.nbytes)
        return pages

    def read_latents(self, pages: Tensor, page_ids: Tensor, latent: int, rope: int) -> Tensor:
        if _check_pages(pages, latent, rope):
            return read_pages_ref(pages[page_ids.long()], latent, rope).flatten(0, 1)
        width = latent + rope
        out = torch.empty(len(page_ids), PAGE_TOKENS, width)
        for page, rows in zip(page_ids.tolist(), out, strict=True):
            self.library.rs_read_latents(pages[page].data_ptr(), width, rows.data_ptr())
        return out.flatten(0, 1)

    def store_latents(
        self, ckr_TX: Tensor, norm: Norm, cos_sin_PR: Tensor, positions_T: Tensor,
        slots_T: Tensor, pages: Tensor,
    ) -> None:  # fmt: skip
        latent, rope = norm.weight_K.shape[0], cos_sin_PR.shape[1]
        x = _rows(ckr_TX, latent + rope)
        fp8 = _check_pages(pages, latent, rope)
        self.library.rs_store_latents(
            x.data_ptr(), x.stride(0), x.shape[0], latent, rope, norm.weight_K.data_ptr(),
            norm.eps, cos_sin_PR.data_ptr(), positions_T.data_ptr(), slots_T.data_ptr(),
            pages.data_ptr(), fp8,
        )  # fmt: skip

    def attend(
        self, q_THW: Tensor, w_uk: NativeWeight, w_uv: NativeWeight, cos_sin_PR: Tensor,
        pages: Tensor, page_table_BP: Tensor, sequence_T: Tensor, positions_T: Tensor,
        scale: float,
    ) -> Tensor:  # fmt: skip
        rows, heads, _ = q_THW.shape
        rope = cos_sin_PR.shape[1]
        q = _rows(q_THW, w_uk.k + rope).contiguous()
        fp8 = _check_pages(pages, w_uk.n, rope)
        out = torch.empty(rows, heads * w_uv.n)
        self.library.rs_attend(
            q.data_ptr(), rows, rope, w_uk.address, w_uv.address, cos_sin_PR.data_ptr(),
            positions_T.data_ptr(), sequence_T.data_ptr(), pages.data_ptr(),
            page_table_BP.data_ptr(), page_table_BP.shape[1], scale, out.data_ptr(), fp8,
        )  # fmt: skip
        return out

    def route(
        self, logits_TE: Tensor, bias_E: Tensor, groups: int, keep_groups: int, top_k: int,
        normalise: bool, factor: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        experts = bias_E.shape[0]
        x = _rows(logits_TE, experts)
        if experts % groups or keep_groups > groups or top_k > keep_groups * experts // groups:
            raise ValueError(
                f"cannot choose {top_k} of {experts} experts in {keep_groups} of {groups} groups"
            )
        ids = torch.empty(x.shape[0], top_k, dtype=torch.int32)
        weights = torch.empty(x.shape[0], top_k)
        self.library.rs_route(
            x.data_ptr(), x.stride(0), x.shape[0], experts, bias_E.data_ptr(), groups,
            keep_groups, top_k, normalise, factor, ids.data_ptr(), weights.data_ptr(),
        )  # fmt: skip
        return ids, weights

    def mlp(self, x_TD: Tensor, gate_up: NativeWeight, down: NativeWeight) -> Tensor:
        x = _rows(x_TD, gate_up.k)
        out = torch.empty(x.shape[0], down.n)
        self.library.rs_mlp(
            x.data_ptr(), x.stride(0), x.shape[0], gate_up.address, down.address, out.data_ptr()
        )
        return out

    def experts(
        self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, packed: NativeExperts,
        into_TD: Tensor,
    ) -> None:  # fmt: skip
        if not packed.count:
            return
        x = _rows(x_TD, packed.gate_up[0].k)
        _check_writable(into_TD, "into", packed.down[0].n)
        expert_TK = _ints(expert_TK)
        weight = _rows(weight_TK, expert_TK.shape[1]).contiguous()
        if self.library.rs_experts(
            x.data_ptr(), x.stride(0), x.shape[0], expert_TK.shape[1], expert_TK.data_ptr(),
            weight.data_ptr(), packed.count, packed.gate_up_array, packed.down_array,
            into_TD.data_ptr(), into_TD.stride(0),
        ):  # fmt: skip
            raise ValueError(f"expert ids must be 0..{packed.count - 1}, the experts packed")

    def whole_pass(self, parts: PassParts, pages: Sequence[Tensor]) -> NativePass:
        return NativePass(self.library, parts, pages)

    def join_experts(self, parts: list[NativeExperts]) -> NativeExperts:
        return NativeExperts(
            [w for part in parts for w in part.gate_up], [w for part in parts for w in part.down]
        )

    def expert_part(self, packed: NativeExperts, index: int) -> NativeExperts:
        return NativeExperts([packed.gate_up[index]], [packed.down[index]])

    def row_words(self, x_TD: Tensor) -> Tensor:
        return x_TD.view(torch.int32)

    def expert_rows(
        self, x_RW: Tensor, row_N: Tensor, expert_N: Tensor, packed: NativeExperts
    ) -> Tensor:
        if not packed.count or not row_N.shape[0]:
            return torch.zeros(row_N.shape[0], x_RW.shape[1])
        x = _rows(x_RW.view(torch.float32), packed.gate_up[0].k)
        row_N, expert_N = _ints(row_N), _ints(expert_N)
        out = torch.empty(row_N.shape[0], packed.down[0].n)
        if self.library.rs_expert_rows(
            x.data_ptr(), x.stride(0), row_N.shape[0], row_N.data_ptr(), expert_N.data_ptr(),
            packed.count, packed.gate_up_array, packed.down_array, out.data_ptr(),
        ):  # fmt: skip
            raise ValueError(f"expert ids must be -1..{packed.count - 1}, the experts packed")
        return out

    def combine(self, y_MD: Tensor, index_TK: Tensor, weight_TK: Tensor, into_TD: Tensor) -> None:
        y = _rows(y_MD, into_TD.shape[1]).contiguous()
        _check_writable(into_TD, "into", y.shape[1])
        rows, top_k = index_TK.shape
        index, weight = _ints(index_TK), _rows(weight_TK, top_k).contiguous()
        if self.library.rs_combine(
            y.data_ptr(), y.shape[0], rows, top_k, index.data_ptr(), weight.data_ptr(), y.shape[1],
            into_TD.data_ptr(), into_TD.stride(0),
        ):  # fmt: skip
            raise ValueError(f"indices must be 0..{y.shape[0] - 1}, the rows that came back")


def _rows(x: Tensor, width: int) -> Tensor:
    """x as float32 with its last dimension contiguous; ValueError for another width."""
    if x.shape[-1] != width:
        raise ValueError(f"rows have {x.shape[-1]} values, the weight takes {width}")
    if x.dtype is not torch.float32 or x.stride(-1) != 1:
        x = x.float().contiguous()
    return x


def _ints(x: Tensor) -> Tensor:
    """x as contiguous int32."""
    return x if x.dtype is torch.int32 and x.is_contiguous() else x.int().contiguous()


def _check_writable(x: Tensor, name: str, width: int) -> None:
    """Written or read in place, so it cannot be copied: it must be right."""
    if x.dtype is not torch.float32 or x.stride(-1) != 1 or x.shape[-1] != width:
        raise ValueError(
            f"{name} must be float32 rows of {width} contiguous values, not {x.dtype} "
            f"{tuple(x.shape)}"
        )


def _page(latent: int, rope: int, fp8: bool) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of one page."""
    if fp8:
        return (PAGE_TOKENS, Fp8Token(latent, rope).size), torch.uint8
    return (-(-(latent + rope) // 16), PAGE_TOKENS, 16), torch.int32


def _check_pages(pages: Tensor, latent: int, rope: int) -> bool:
    """Whether these pages of such latents are FP8 ones."""
    fp8 = pages.dtype is torch.uint8
    if (pages.shape[1:], pages.dtype) != _page(latent, rope, fp8) or not pages.is_contiguous():
        raise ValueError(
            f"pages must come from new_pages(count, {latent}, {rope}), not have the shape "
            f"{tuple(pages.shape)}"
        )
    return fp8
