"""A token's row on its way to experts: its values, its expert slots, and whose it is.

One row is `width` int32 words: hidden values as the operations send them (float32; or e4m3, then a
float32 scale for every 128 of them), then one slot for each chosen expert, then the number of its
home member. A slot of -1 wants nothing. Products return as bare values. Needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 128  # values that share a scale


class WireRows:
    """The layout for `hidden` values and `top_k` experts.

    fp8: of GPUs, whose kernels multiply e4m3 in any case: a quarter the bytes there, bfloat16 and
    half of them back. Raises ValueError for rows that are no whole words.
    """

    def __init__(self, hidden: int, top_k: int, fp8: bool) -> None:
        if fp8 and hidden % 4:
            raise ValueError(f"rows of {hidden} values cannot travel as fp8: not a multiple of 4")
        self.hidden, self.top_k, self.fp8 = hidden, top_k, fp8
        self.words = hidden // 4 + -(-hidden // BLOCK) if fp8 else hidden
        self.width = self.words + top_k + 1

    @property
    def row_bytes(self) -> int:
        return 4 * self.width

    @property
    def product_bytes(self) -> int:
        return self.hidden * (2 if self.fp8 else 4)

    def values(self, packed: Tensor) -> Tensor:
        """int32 [N, words], a view: what `SplitOps.row_words` made."""
        return packed[:, : self.words]

    def slots(self, packed: Tensor) -> Tensor:
        """int32 [N, K], a view."""
        return packed[:, self.words : -1]

    def homes(self, packed: Tensor) -> Tensor:
        """int32 [N], a view."""
        return packed[:, -1]
