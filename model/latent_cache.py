"""The KV pages of one device: per layer, 64-token pages of latents and rotated keys.

MLA caches nothing else (spec section 1.8). Which page belongs to whom is `cluster/pages.py`.
"""

from __future__ import annotations

from torch import Tensor

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
            ops.new_pages(num_pages, config.latent_width)
            for _ in range(config.num_hidden_layers if layers is None else layers)
        ]

    @staticmethod
    def page_bytes(config: ModelConfig, layers: int | None = None, value_bytes: int = 4) -> int:
        """Bytes of one page over `layers` layers, by default the main model's.

        value_bytes: 4 on a CPU, 2 on a GPU.
        """
        count = config.num_hidden_layers if layers is None else layers
        return count * PAGE_TOKENS * -(-config.latent_width // 16) * 16 * value_bytes
