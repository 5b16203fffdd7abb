"""Block-scaled FP8 weights: 128x128 blocks of e4m3 with one float32 multiplier each.

The layout of the official checkpoint (spec section 4.2); `weight_scale_inv` is a multiplier
despite its name, and a partial block at an edge has a scale of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayseek.kernels.ops import Weight

BLOCK = 128  # rows and columns that share a scale
E4M3_MAX = 448.0
LEAST = 2.0**-100  # values of a group without a larger one become zeros: its scale would be none


def quantise_blocks_ref(w_NK: Tensor) -> Weight:
    """Any float [N, K] as e4m3 with scales amax / 448 (1 for a block of zeros)."""
    blocks = _blocks(w_NK.float())
    scale = _scales(blocks.abs().amax(dim=(1, 3)))
    data = (blocks / scale[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX)
    n, k = w_NK.shape
    flat = data.reshape(data.shape[0] * BLOCK, -1)[:n, :k]
    return Weight(flat.to(torch.float8_e4m3fn).contiguous(), scale)


def quantise_rows_ref(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Activations [T, K] as e4m3, and float32 scales [ceil(K/128), T]: amax / 448, 1 for zeros."""
    rows, k = x_TK.shape
    padded = torch.nn.functional.pad(x_TK.float(), (0, -k % BLOCK))
    groups = padded.view(rows, -(-k // BLOCK), BLOCK)
    scale = _scales(groups.abs().amax(dim=-1))
    data = (groups / scale[..., None]).clamp(-E4M3_MAX, E4M3_MAX).flatten(1)[:, :k]
    return data.to(torch.float8_e4m3fn).contiguous(), scale.T.contiguous()


def dequantise_rows_ref(data: Tensor, scale_GT: Tensor) -> Tensor:
    """The float32 values [T, K] of quantised activations."""
    return data.float() * scale_GT.T.repeat_interleave(BLOCK, 1)[:, : data.shape[1]]


def dequantise_ref(weight: Weight) -> Tensor:
    """The float32 values [N, K] of a weight, whatever it is stored as.

    Raises ValueError when the scales do not have one entry per 128x128 block.
    """
    if weight.scale_inv is None:
        return weight.data.float()
    n, k = weight.data.shape
    expected = (-(-n // BLOCK), -(-k // BLOCK))
    if tuple(weight.scale_inv.shape) != expected:
        raise ValueError(
            f"scales of a [{n}, {k}] weight have shape {tuple(weight.scale_inv.shape)}; "
            f"with {BLOCK}x{BLOCK} blocks it must be {expected}"
        )
    rows = weight.scale_inv.float().repeat_interleave(BLOCK, 0)[:n]
    return weight.data.float() * rows.repeat_interleave(BLOCK, 1)[:, :k]


def _scales(amax: Tensor) -> Tensor:
    return torch.where(amax > LEAST, amax / E4M3_MAX, 1.0)


def _blocks(w_NK: Tensor) -> Tensor:
    """[N, K] padded with zeros and viewed as [N/128, 128, K/128, 128]."""
    n, k = w_NK.shape
    padded = torch.nn.functional.pad(w_NK, (0, -k % BLOCK, 0, -n % BLOCK))
    return padded.reshape(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
