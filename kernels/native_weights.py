"""Matrices in the layout that `native.cpp` multiplies by, and their packing.

A matrix [n, k] becomes tiles of 16 columns of the result by 32 values of k, pairs of k together:
what an AMX tile is loaded with. Values stay exact: bf16 as they are, e4m3 as its bytes where the
CPU can widen them, else as bf16, with block scales beside, float32 as a sum of up to three bf16
planes.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn.functional import pad

from rayseek.kernels.fp8 import BLOCK, dequantise_ref
from rayseek.kernels.ops import Weight

COLUMNS, DEPTH = 16, 32  # of a tile


class _Struct(ctypes.Structure):
    """`struct Packed` of native.cpp."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("n", ctypes.c_int32),
        ("k", ctypes.c_int32),
        ("planes", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("narrow", ctypes.c_int32),
    )


class NativeWeight:
    """One matrix, or one for each head, packed; `address` is what the library is given."""

    __slots__ = ("address", "data", "k", "n", "scale", "struct")

    def __init__(self, planes_HPNK: Tensor, scale_HBN: Tensor | None = None) -> None:
        """planes bf16 [H, P, N, K]; scale float32 [H, ceil(K/128), N] by column, or none.

        Of e4m3, planes may be its bytes, uint8 [H, 1, N, K], with a scale.
        """
        heads, planes, n, k = planes_HPNK.shape
        padded = pad(planes_HPNK, (0, -k % DEPTH, 0, -n % COLUMNS))
        tiled = padded.view(
            heads, planes, padded.shape[2] // COLUMNS, COLUMNS, padded.shape[3] // DEPTH,
            DEPTH // 2, 2,
        )  # fmt: skip
        self.n, self.k = n, k
        self.data = tiled.permute(0, 2, 4, 1, 5, 3, 6).contiguous()
        narrow = self.data.dtype is torch.uint8
        if narrow:  # as `widen` of native_matrix.h takes them
            self.data = self.data.view(-1, 2, 4, 8).transpose(1, 2).contiguous()
        self.scale = None if scale_HBN is None else pad(scale_HBN, (0, -n % COLUMNS)).contiguous()
        scale = None if self.scale is None else self.scale.data_ptr()
        self.struct = _Struct(self.data.data_ptr(), scale, n, k, planes, heads, narrow)
        self.address = ctypes.addressof(self.struct)


class NativeExperts:
    """The packed experts of a layer, as two arrays of matrices."""

    __slots__ = ("count", "down", "down_array", "gate_up", "gate_up_array")

    def __init__(self, gate_up: list[NativeWeight], down: list[NativeWeight]) -> None:
        self.count, self.gate_up, self.down = len(gate_up), gate_up, down
        self.gate_up_array = (_Struct * len(gate_up))(*(w.struct for w in gate_up))
        self.down_array = (_Struct * len(down))(*(w.struct for w in down))


def pack_matrix(weights: list[Weight], narrow: bool = False) -> NativeWeight:
    """Matrices of one K, one below the other. narrow: e4m3 is kept as bytes."""
    narrow = narrow and not any(_has_nan(weight.data) for weight in weights)
    stored = {(weight.data.dtype, weight.scale_inv is not None) for weight in weights}
    if stored == {(torch.float8_e4m3fn, True)}:
        data = torch.cat([_e4m3(weight.data, narrow) for weight in weights])
        scale = torch.cat([_scale_by_row(weight) for weight in weights])
        return NativeWeight(data[None, None], scale.T[None])
    if stored == {(torch.bfloat16, False)}:
        return NativeWeight(torch.cat([weight.data for weight in weights])[None, None])
    return NativeWeight(_planes(torch.cat([dequantise_ref(weight) for weight in weights]))[None])


def pack_latent_heads(
    kv_b: Weight, heads: int, nope: int, value: int, narrow: bool = False
) -> tuple[NativeWeight, NativeWeight]:
    """kv_b_proj [H*(N+V), C] as W_UK, contracted over N, and W_UV, contracted over C."""
    if kv_b.scale_inv is None:
        planes = _planes(kv_b.data)
    else:
        narrow = narrow and not _has_nan(kv_b.data)
        scaled = _pack_scaled_heads(kv_b, heads, nope, value, narrow)
        if scaled is not None:
            return scaled
        planes = _planes(dequantise_ref(kv_b))
    by_head = planes.view(planes.shape[0], heads, nope + value, -1).transpose(0, 1)
    return NativeWeight(by_head[:, :, :nope].transpose(2, 3)), NativeWeight(by_head[:, :, nope:])


def _pack_scaled_heads(
    kv_b: Weight, heads: int, nope: int, value: int, narrow: bool
) -> tuple[NativeWeight, NativeWeight] | None:
    """The same of e4m3, kept exact; None where a head's W_UK cuts scale blocks unevenly."""
    assert kv_b.scale_inv is not None
    rows = torch.arange(heads)[:, None] * (nope + value) + torch.arange(nope)
    block = rows // BLOCK
    first = block[:, ::BLOCK]
    if not bool((first.repeat_interleave(BLOCK, 1)[:, :nope] == block).all()):
        return None
    data = _e4m3(kv_b.data, narrow).view(heads, 1, nope + value, -1)
    columns = kv_b.scale_inv.float().repeat_interleave(BLOCK, 1)[:, : data.shape[-1]]
    by_row = _scale_by_row(kv_b).view(heads, nope + value, -1)[:, nope:]
    return (
        NativeWeight(data[:, :, :nope].transpose(2, 3), columns[first]),
        NativeWeight(data[:, :, nope:], by_row.transpose(1, 2)),
    )


def _has_nan(data: Tensor) -> bool:
    """Of e4m3: a number that `widen` of native_matrix.h does not know."""
    e4m3 = data.dtype is torch.float8_e4m3fn
    return e4m3 and bool((data.view(torch.uint8) & 0x7F == 0x7F).any())


def _e4m3(data: Tensor, narrow: bool) -> Tensor:
    return data.view(torch.uint8) if narrow else data.to(torch.bfloat16)


def _scale_by_row(weight: Weight) -> Tensor:
    """Scales of an e4m3 [N, K] as [N, ceil(K/128)]."""
    assert weight.scale_inv is not None
    return weight.scale_inv.float().repeat_interleave(BLOCK, 0)[: weight.data.shape[0]]


def _planes(values: Tensor) -> Tensor:
    """bf16 [P, N, K] that sum exactly to the values; only as many as it takes."""
    if values.dtype == torch.bfloat16:
        return values[None]
    planes: list[Tensor] = []
    rest = values.float()
    while len(planes) < 3 and (not planes or bool(rest.any())):
        planes.append(rest.to(torch.bfloat16))
        rest = rest - planes[-1].float()
    return torch.stack(planes)
