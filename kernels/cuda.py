"""`CudaOps`: every operation by the Triton kernels of `hopper/`, on one GPU.

Weights stay as the checkpoint has them: block-FP8 matrices are multiplied in FP8 with activations
quantised per row and 128 columns, bfloat16 ones (head, router gate) in bfloat16. The residual
stream is float32; between two operations values are bfloat16. A call asks the host for nothing, so
that a step can be recorded as a CUDA graph, and gives a row the same bits in every batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rayseek.kernels.fp8 import BLOCK, dequantise_ref, quantise_blocks_ref
from rayseek.kernels.hopper import (
    bf16_gemm,
    fp8_gemm,
    latent_cache,
    mla_decode,
    permute,
    quantise,
    router,
)
from rayseek.kernels.kv_format import PAGE_TOKENS, Fp8Token, KVDtype
from rayseek.kernels.latent_pages import read_pages_ref
from rayseek.kernels.mla_attention import split_heads_ref
from rayseek.kernels.ops import Norm, Weight


@dataclass(frozen=True, slots=True)
class CudaWeight:
    """e4m3 [N, K] with scales [N/128, K/128]; or bfloat16 [N, K] without."""

    data: Tensor
    scale_inv: Tensor | None


@dataclass(frozen=True, slots=True)
class CudaExperts:
    """Block-FP8 matrices of E experts: gate_up [E, 2F, D], down [E, D, F]; F in whole blocks."""

    gate_up: Tensor
    gate_up_scale: Tensor
    down: Tensor
    down_scale: Tensor


class CudaOps:
    """`SplitOps` on a CUDA device. ("cpu" is for Triton's interpreter.)"""

    name = "cuda"
    fp8_rows = True

    def __init__(self, device: str = "cuda", kv_dtype: KVDtype = "auto") -> None:
        self.device, self.kv_dtype = torch.device(device), kv_dtype

    # ---- weights ----

    def pack(self, weight: Weight) -> CudaWeight:
        return self.pack_stack([weight])

    def pack_stack(self, weights: list[Weight]) -> CudaWeight:
        if all(w.scale_inv is not None for w in weights) and not any(
            len(w.data) % BLOCK for w in weights[:-1]
        ):
            return CudaWeight(
                torch.cat([w.data.to(self.device) for w in weights]),
                torch.cat(
                    [w.scale_inv.to(self.device) for w in weights if w.scale_inv is not None]
                ),
            )
        return CudaWeight(torch.cat([self._plain(w) for w in weights]), None)

    def pack_heads(self, kv_b: Weight, heads: int, nope: int, value: int) -> tuple[Tensor, Tensor]:
        """W_UK as [H, C, N], so that its sums run over neighbours in memory, and W_UV [H, V, C]."""
        w_uk, w_uv = split_heads_ref(self._plain(kv_b), heads, nope, value)
        return w_uk.transpose(1, 2).contiguous(), w_uv.contiguous()

    def pack_experts(self, gate_up: list[list[Weight]], down: list[Weight]) -> CudaExperts:
        """In block-FP8 whatever the checkpoint has: the grouped products know no other format.

        Expert after expert is put into its place, so that no layer is ever held twice.
        """
        hidden, inner = down[0].data.shape if down else (0, 0)
        inner = -(-inner // BLOCK) * BLOCK
        count, places = len(down), self._empty_experts(len(down), hidden, inner)
        for e in range(count):
            pair = [self._blocks(w, rows=inner) for w in gate_up[e]]
            last = self._blocks(down[e], columns=inner)
            for place, parts in (
                (places.gate_up, [w.data for w in pair]),
                (places.gate_up_scale, [_scale(w) for w in pair]),
                (places.down, [last.data]),
                (places.down_scale, [_scale(last)]),
            ):
                torch.cat(parts, out=place[e])
        return places

    def _empty_experts(self, count: int, hidden: int, inner: int) -> CudaExperts:
        def data(rows: int, columns: int) -> Tensor:
            return torch.empty(count, rows, columns, dtype=torch.float8_e4m3fn, device=self.device)

        def scale(rows: int, columns: int) -> Tensor:
            blocks = -(-rows // BLOCK), -(-columns // BLOCK)
            return torch.empty(count, *blocks, device=self.device)

        shapes = (2 * inner, hidden), (hidden, inner)
        return CudaExperts(data(*shapes[0]), scale(*shapes[0]), data(*shapes[1]), scale(*shapes[1]))

    def join_experts(self, parts: list[CudaExperts]) -> CudaExperts:
        """A copy, since a grouped product wants one tensor; and of one part too, which may be
        a piece of something large."""
        return CudaExperts(
            torch.cat([p.gate_up for p in parts]), torch.cat([p.gate_up_scale for p in parts]),
            torch.cat([p.down for p in parts]), torch.cat([p.down_scale for p in parts]),
        )  # fmt: skip

    def expert_part(self, packed: CudaExperts, index: int) -> CudaExperts:
        one = slice(index, index + 1)
        return CudaExperts(
            packed.gate_up[one], packed.gate_up_scale[one],
            packed.down[one], packed.down_scale[one],
        )  # fmt: skip

    def _plain(self, weight: Weight) -> Tensor:
        """bfloat16 values on the device."""
        scale = None if weight.scale_inv is None else weight.scale_inv.to(self.device)
        return dequantise_ref(Weight(weight.data.to(self.device), scale)).bfloat16()

    def _blocks(self, weight: Weight, rows: int = 0, columns: int = 0) -> Weight:
        """Block-FP8 on the device, filled up with zeros to so many rows or columns."""
        n, k = weight.data.shape
        below, right = max(rows - n, 0), max(columns - k, 0)
        if weight.scale_inv is not None and not below and not right:
            return Weight(weight.data.to(self.device), weight.scale_inv.to(self.device))
        return quantise_blocks_ref(
            torch.nn.functional.pad(self._plain(weight).float(), (0, right, 0, below))
        )

    # ---- dense layers ----

    def linear(
        self, x_TK: Tensor, w: CudaWeight, norm: Norm | None = None,
        residual_TN: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """bfloat16 from FP8 weights; float32 from bfloat16 ones and with a residual."""
        residual = None if residual_TN is None else residual_TN.float()
        if w.scale_inv is None:
            x = x_TK.bfloat16() if norm is None else quantise.rms_norm(x_TK, norm)
            return bf16_gemm.bf16_matmul(x, w.data, residual)
        if norm is None:
            data, scale = quantise.quantise(x_TK)
        else:
            data, scale = quantise.rms_norm_quantised(x_TK, norm)
        return fp8_gemm.fp8_matmul(data, scale, w.data, w.scale_inv, residual)

    def rms_norm(self, x_TD: Tensor, norm: Norm) -> Tensor:
        return quantise.rms_norm(x_TD, norm)

    def mlp(self, x_TD: Tensor, gate_up: CudaWeight, down: CudaWeight) -> Tensor:
        both = self.linear(x_TD, gate_up)
        if down.scale_inv is None:
            gate, up = both.chunk(2, dim=-1)
            return self.linear(torch.nn.functional.silu(gate) * up, down)
        data, scale = quantise.quantise(both, gated=True)
        return fp8_gemm.fp8_matmul(data, scale, down.data, down.scale_inv)

    # ---- attention ----

    def new_pages(self, count: int, latent: int, rope: int) -> Tensor:
        fp8 = self.kv_dtype == "fp8"
        width = Fp8Token(latent, rope).size if fp8 else latent + rope
        dtype = torch.uint8 if fp8 else torch.bfloat16
        return torch.zeros(count, PAGE_TOKENS, width, dtype=dtype, device=self.device)

    def read_latents(self, pages: Tensor, page_ids: Tensor, latent: int, rope: int) -> Tensor:
        return read_pages_ref(pages[page_ids.long()], latent, rope).flatten(0, 1).float()

    def store_latents(
        self, ckr_TX: Tensor, norm: Norm, cos_sin_PR: Tensor, positions_T: Tensor,
        slots_T: Tensor, pages: Tensor,
    ) -> None:  # fmt: skip
        latent_cache.store_latents(ckr_TX, norm, cos_sin_PR, positions_T, slots_T, pages)

    def attend(
        self, q_THW: Tensor, w_uk: Tensor, w_uv: Tensor, cos_sin_PR: Tensor, pages: Tensor,
        page_table_BP: Tensor, sequence_T: Tensor, positions_T: Tensor, scale: float,
    ) -> Tensor:  # fmt: skip
        q_THW = q_THW.bfloat16()
        heads, latent, nope = w_uk.shape
        rows, value = len(q_THW), w_uv.shape[1]
        q_THX = q_THW.new_empty(rows, heads, latent + cos_sin_PR.shape[1])
        bf16_gemm.bf16_batched(q_THW[..., :nope], w_uk, q_THX[..., :latent])
        latent_cache.rotate_queries(q_THW[..., nope:], cos_sin_PR, positions_T, q_THX[..., latent:])
        u_THC = mla_decode.mla_attention(
            q_THX, pages, page_table_BP, sequence_T, positions_T, scale, latent
        )
        out_THV = q_THW.new_empty(rows, heads, value)
        bf16_gemm.bf16_batched(u_THC, w_uv, out_THV)
        return out_THV.flatten(1)

    # ---- experts ----

    def route(
        self, logits_TE: Tensor, bias_E: Tensor, groups: int, keep_groups: int, top_k: int,
        normalise: bool, factor: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return router.route(logits_TE, bias_E, groups, keep_groups, top_k, normalise, factor)

    def experts(
        self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, packed: CudaExperts,
        into_TD: Tensor,
    ) -> None:  # fmt: skip
        if not expert_TK.numel():
            return
        top_k = expert_TK.shape[1]
        y_ND = x_TD.new_empty(expert_TK.numel(), x_TD.shape[1], dtype=torch.bfloat16)
        rows = quantise.quantise(x_TD)
        self._products(rows, expert_TK.reshape(-1), top_k, packed, y_ND)
        permute.combine(y_ND, weight_TK, into_TD)

    def row_words(self, x_TD: Tensor) -> Tensor:
        """Quantised at home, once, as an expert here would have it."""
        return quantise.to_words(*quantise.quantise(x_TD))

    def expert_rows(
        self, x_RW: Tensor, row_N: Tensor, expert_N: Tensor, packed: CudaExperts
    ) -> Tensor:
        hidden = packed.down.shape[1]
        y_ND = x_RW.new_zeros(len(row_N), hidden, dtype=torch.bfloat16)
        if len(row_N) and len(packed.down):
            rows = quantise.from_words(x_RW, hidden)
            self._products(rows, expert_N.int(), row_N.int(), packed, y_ND)
        return y_ND

    def combine(self, y_MD: Tensor, index_TK: Tensor, weight_TK: Tensor, into_TD: Tensor) -> None:
        permute.combine(y_MD, weight_TK, into_TD, index_TK.int())

    def _products(
        self, x: tuple[Tensor, Tensor], expert_N: Tensor, rows: Tensor | int, packed: CudaExperts,
        y_ND: Tensor,
    ) -> None:  # fmt: skip
        """y[i] = expert[i](x[its row]) for every pair i with an expert here; x as `quantise`
        gives it."""
        count, both, d = packed.gate_up.shape
        wide = all(fp8_gemm.can_be_wide(n, k, True) for n, k in ((both, d), (d, both // 2)))
        to = permute.assign(expert_N.contiguous(), count, rows, fp8_gemm.WIDE_ROWS if wide else 64)
        data, scale = x
        rows_from: Tensor | None = to.row_S
        if to.tiles.rows == fp8_gemm.WIDE_ROWS:  # TMA loads neighbours only
            data, scale = permute.gather(data, scale, to)
            rows_from = None
        inner = y_ND.new_empty(len(y_ND), both)
        fp8_gemm.grouped_fp8_matmul(
            data, scale, packed.gate_up, packed.gate_up_scale, to.tiles, inner, rows_from
        )
        data, scale = quantise.quantise(inner, gated=True, rows_used=to.used)
        fp8_gemm.grouped_fp8_matmul(
            data, scale, packed.down, packed.down_scale, to.tiles, y_ND, None, to.pair_S
        )


def _scale(weight: Weight) -> Tensor:
    assert weight.scale_inv is not None
    return weight.scale_inv
