"""A token's row on its way to experts: its values, its expert slots, and whose it is.

One row is `width` int32 words: hidden values (float32, or e4m3 with a float32 scale for every 128
of them), then one slot for each chosen expert, then the number of its home member. A slot of -1
wants nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayseek.kernels.fp8 import BLOCK, dequantise_rows_ref, quantise_rows_ref


class WireRows:
    """The layout for `hidden` values and `top_k` experts. fp8: e4m3 values, a quarter the bytes."""

    def __init__(self, hidden: int, top_k: int, fp8: bool) -> None:
        if fp8 and hidden % 4:
            raise ValueError(f"rows of {hidden} values cannot travel as fp8: not a multiple of 4")
        self.hidden, self.top_k, self.fp8 = hidden, top_k, fp8
        self._data = hidden // 4 if fp8 else hidden
        self._values = self._data + (-(-hidden // BLOCK) if fp8 else 0)
        self.width = self._values + top_k + 1

    def words(self, x_TD: Tensor) -> Tensor:
        """int32 [T, W]: the values, before slots and home are put behind them (RowPlaces.pack)."""
        if not self.fp8:
            return x_TD.view(torch.int32)
        data, scale_GT = quantise_rows_ref(x_TD)
        return torch.cat([part.view(torch.int32) for part in (data, scale_GT.T.contiguous())], 1)

    def values(self, packed: Tensor) -> Tensor:
        """float32 [N, D]; of rows without fp8, a view of them."""
        data = packed[:, : self._data]
        if not self.fp8:
            return data.view(torch.float32)
        scale_NG = packed[:, self._data : self._values].view(torch.float32)
        return dequantise_rows_ref(data.contiguous().view(torch.float8_e4m3fn), scale_NG.T)

    def slots(self, packed: Tensor) -> Tensor:
        """int32 [N, K], a view."""
        return packed[:, self._values : -1]

    def homes(self, packed: Tensor) -> Tensor:
        """int32 [N], a view."""
        return packed[:, -1]
