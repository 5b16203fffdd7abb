"""How many bytes a cached token takes, and where they lie in an FP8 page. Needs no torch.

An FP8 token is one run of bytes: its latent in e4m3, a float32 scale for each 128 values of it, its
rotary key in bfloat16; 656 bytes for V3. The scales are powers of two, so that every value of such
a page is a bfloat16 number and all devices read the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PAGE_TOKENS = 64  # of a page of latents: DeepSeek's context-cache unit (spec section 6.5)
KVDtype = Literal["auto", "fp8"]  # auto: bfloat16 on a GPU; on a CPU float32, to 2^-16
GROUP = 128  # latent values that share a scale
ALIGN = 16  # bytes, of tokens and keys: a GPU's tensor memory accelerator steps by so many


@dataclass(frozen=True, slots=True)
class Fp8Token:
    """Offsets, in bytes, of the parts of an FP8 token with C = latent and R = rope values."""

    latent: int
    rope: int

    @property
    def groups(self) -> int:
        """Scales of a token."""
        return -(-self.latent // GROUP)

    @property
    def scales_at(self) -> int:
        return -(-self.latent // 4) * 4

    @property
    def keys_at(self) -> int:
        return -(-(self.scales_at + 4 * self.groups) // ALIGN) * ALIGN

    @property
    def size(self) -> int:
        return -(-(self.keys_at + 2 * self.rope) // ALIGN) * ALIGN


def token_bytes(kv_dtype: KVDtype, device: str, latent: int, rope: int) -> int:
    """Bytes of one token in one layer. On a CPU "auto" rounds up to whole blocks of 16 values."""
    if kv_dtype == "fp8":
        return Fp8Token(latent, rope).size
    width = latent + rope
    return 2 * width if device == "cuda" else -(-width // 16) * 16 * 4
