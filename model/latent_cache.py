"""The KV pages of one device: per layer, 64-token pages of latents and rotated keys.

MLA caches nothing else (spec section 1.8). Which page belongs to whom is `cluster/pages.py`.
A page can be copied to another device's cache as plain words, with a checksum.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from rayseek.kernels.kv_format import KVDtype, token_bytes
from rayseek.kernels.ops import Ops
from rayseek.model.batch import PAGE_TOKENS
from rayseek.model.config import ModelConfig


class LatentCache:
    """Pages as `ops` keeps them, for each of `layers` layers."""

    def __init__(
        self, config: ModelConfig, num_pages: int, ops: Ops, layers: int | None = None
    ) -> None:
        self.num_pages = num_pages
        self.layers: list[Tensor] = [
            ops.new_pages(num_pages, config.kv_lora_rank, config.qk_rope_head_dim)
            for _ in range(config.num_hidden_layers if layers is None else layers)
        ]
        self._words = [pages.flatten(1).view(torch.int32) for pages in self.layers]

    @property
    def device(self) -> torch.device:
        return self.layers[0].device

    @property
    def page_words(self) -> int:
        """32-bit words of one page, all layers together."""
        return sum(words.shape[1] for words in self._words)

    def read_pages(self, pages: Sequence[int]) -> Tensor:
        """A copy of these pages: int32 [pages, page_words], layer by layer, as they lie."""
        index = torch.tensor(pages, dtype=torch.int64, device=self.device)
        return torch.cat([words[index] for words in self._words], dim=1)

    def write_pages(self, pages: Sequence[int], words_NW: Tensor) -> None:
        """Make these pages what `read_pages` gave, here or at a cache of the same layout."""
        index = torch.tensor(pages, dtype=torch.int64, device=self.device)
        parts = words_NW.split([words.shape[1] for words in self._words], dim=1)
        for words, part in zip(self._words, parts, strict=True):
            words[index] = part

    @staticmethod
    def page_bytes(
        config: ModelConfig,
        layers: int | None = None,
        device: str = "cpu",
        kv_dtype: KVDtype = "auto",
    ) -> int:
        """Bytes of one page over `layers` layers, by default the main model's, on "cpu", "cuda"."""
        count = config.num_hidden_layers if layers is None else layers
        token = token_bytes(kv_dtype, device, config.kv_lora_rank, config.qk_rope_head_dim)
        return count * PAGE_TOKENS * token


def checksums(words_NW: Tensor) -> list[int]:
    """A signed 64-bit checksum of each row of int32 words, the same on every device.

    Multilinear: the words times fixed odd random numbers, summed modulo 2^64. One wrong word is
    always noticed, any other damage but for one case in billions; a GPU computes it where it is.
    """
    if not len(words_NW):
        return []
    weights_W = _checksum_weights(words_NW.shape[1], words_NW.device)
    sums: list[int] = torch.stack([(row.long() * weights_W).sum() for row in words_NW]).tolist()
    return sums  # the one time that a GPU is waited for


@lru_cache(maxsize=4)
def _checksum_weights(count: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    low, high = torch.randint(0, 2**32, (2, count), generator=generator)
    weights_W: Tensor = ((high << 32) | low | 1).to(device)
    return weights_W
