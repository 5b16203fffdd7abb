"""A whole pass as one call of C++ (`native_pass.h`).

What `native.py` does operation by operation, with the same bits: at one row, most of a step was
the way from Python to C++ and back, some forty times.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rayseek.kernels.native_build import FLOAT, POINTER
from rayseek.kernels.ops import LayerParts, Norm, PassParts, PassRows
from rayseek.kernels.sampler import PackedDraws, Row

COUNT = ctypes.c_int64


class _Moe(ctypes.Structure):
    _fields_ = (
        ("gate", POINTER), ("gate_up", POINTER), ("down", POINTER), ("bias", POINTER),
        ("experts", COUNT), ("groups", COUNT), ("keep", COUNT), ("top_k", COUNT),
        ("normalise", COUNT), ("rows", POINTER), ("factor", FLOAT),
    )  # fmt: skip


class _Layer(ctypes.Structure):
    _fields_ = (
        ("input_norm", POINTER), ("q_norm", POINTER), ("kv_norm", POINTER), ("norm", POINTER),
        ("q_and_kv_a", POINTER), ("q_b", POINTER),
        ("w_uk", POINTER), ("w_uv", POINTER), ("o", POINTER),
        ("gate_up", POINTER), ("down", POINTER), ("moe", POINTER),
    )  # fmt: skip


class _Pass(ctypes.Structure):
    _fields_ = (
        ("embedding", POINTER), ("join", POINTER), ("token_norm", POINTER),
        ("hidden_norm", POINTER), ("final_norm", POINTER), ("cos_sin", POINTER),
        ("head", POINTER), ("layers", POINTER),
        ("count", COUNT), ("width", COUNT), ("rope", COUNT), ("wide", COUNT),
        ("fp8", COUNT),
        ("eps", FLOAT), ("scale", FLOAT),
    )  # fmt: skip


class _Rows(ctypes.Structure):
    _fields_ = (
        ("ids", POINTER), ("slots", POINTER), ("out", POINTER),
        ("positions", POINTER), ("sequence", POINTER), ("table", POINTER),
        ("count", COUNT), ("outs", COUNT), ("table_width", COUNT),
    )  # fmt: skip


class NativePass:
    """`WholePass` of `NativeOps`."""

    def __init__(self, library: ctypes.CDLL, parts: PassParts, pages: Sequence[Tensor]) -> None:
        self._library = library
        self._width, self._vocab = parts.final_norm.weight_K.numel(), parts.head.n
        self._keep: list[Any] = [parts, pages]  # what the structures point to
        self._pages = (POINTER * len(pages))(*(p.data_ptr() for p in pages))
        layers = (_Layer * len(parts.layers))(*(self._layer(layer) for layer in parts.layers))
        token_norm, join, hidden_norm = parts.join or (None, None, None)
        self._pass = _Pass(
            parts.embed_VD.data_ptr(), join and join.address, _norm(token_norm),
            _norm(hidden_norm), _norm(parts.final_norm), parts.cos_sin_PR.data_ptr(),
            parts.head.address, ctypes.addressof(layers),
            len(layers), self._width, parts.cos_sin_PR.shape[1],
            parts.embed_VD.dtype is torch.float32, pages[0].dtype is torch.uint8,
            parts.final_norm.eps, parts.scale,
        )  # fmt: skip
        self._keep.append(layers)
        self._address = ctypes.addressof(self._pass)
        self._rows = _Rows()
        self._rows_address = ctypes.addressof(self._rows)

    def __call__(self, rows: PassRows, hidden_TD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._take(rows)
        hidden_TD = None if hidden_TD is None else self._states(rows, hidden_TD)
        count, outs = rows.ids_T.shape[0], rows.out_rows_R.shape[0]
        logits_RV = torch.empty(outs, self._vocab)
        normed = torch.empty(count if hidden_TD is None else outs, self._width)
        self._library.rs_pass(
            self._address, self._rows_address, None if hidden_TD is None else hidden_TD.data_ptr(),
            self._pages, logits_RV.data_ptr(), normed.data_ptr(),
        )  # fmt: skip
        return logits_RV, normed

    def drafts(
        self, rows: PassRows, hidden_TD: Tensor, draws: Sequence[Row], most: list[int]
    ) -> list[list[int]]:
        self._take(rows)
        hidden_TD, ahead = self._states(rows, hidden_TD), max(most)
        tokens = (ctypes.c_int32 * (len(most) * ahead))()
        packed = PackedDraws(draws, self._vocab)
        self._library.rs_drafts(
            self._address, self._rows_address, hidden_TD.data_ptr(), self._pages, packed.bytes,
            (COUNT * len(most))(*most), ahead, tokens,
        )  # fmt: skip
        found = (tokens[i : i + ahead] for i in range(0, len(tokens), ahead))
        return [[token for token in row if token >= 0] for row in found]

    def _take(self, rows: PassRows) -> None:
        into, table_BP = self._rows, rows.page_table_BP
        into.ids, into.slots = rows.ids_T.data_ptr(), rows.slots_T.data_ptr()
        into.out, into.positions = rows.out_rows_R.data_ptr(), rows.positions_T.data_ptr()
        into.sequence, into.table = rows.sequence_T.data_ptr(), table_BP.data_ptr()
        into.count, into.outs = rows.ids_T.shape[0], rows.out_rows_R.shape[0]
        into.table_width = table_BP.shape[1]

    def _states(self, rows: PassRows, hidden_TD: Tensor) -> Tensor:
        expected = rows.ids_T.shape[0], self._width
        if hidden_TD.shape != expected or hidden_TD.dtype is not torch.float32:
            raise ValueError(f"hidden states must be float32 {expected}")
        return hidden_TD.contiguous()

    def _layer(self, layer: LayerParts) -> _Layer:
        moe = None
        if layer.moe is not None:
            m = layer.moe
            made = _Moe(
                m.gate.address, ctypes.addressof(m.experts.gate_up_array),
                ctypes.addressof(m.experts.down_array), m.bias_E.data_ptr(),
                m.experts.count, m.groups, m.keep_groups, m.top_k, m.normalise,
                None if m.rows_E is None else m.rows_E.data_ptr(), m.factor,
            )  # fmt: skip
            self._keep.append(made)
            moe = ctypes.addressof(made)
        return _Layer(
            _norm(layer.input_norm), _norm(layer.q_norm), _norm(layer.kv_norm), _norm(layer.norm),
            layer.q_and_kv_a.address, layer.q_b and layer.q_b.address,
            layer.w_uk.address, layer.w_uv.address, layer.o.address,
            layer.gate_up.address, layer.down.address, moe,
        )  # fmt: skip


def _norm(norm: Norm | None) -> int | None:
    return None if norm is None else norm.weight_K.data_ptr()
