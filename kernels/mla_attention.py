"""Multi-head latent attention in the absorbed form over paged latents (spec section 1.3).

All heads of a row share one key of C + R values per cached token, whose first C are also its
value. `absorb` brings a query into that space, `unabsorb` brings the result out of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayseek.kernels.latent_pages import read_pages_ref
from rayseek.kernels.rope import rotate_ref


def split_heads_ref(kv_b: Tensor, heads: int, nope: int, value: int) -> tuple[Tensor, Tensor]:
    """kv_b_proj [H*(N+V), C] -> W_UK [H, N, C] and W_UV [H, V, C]."""
    w_uk, w_uv = kv_b.view(heads, nope + value, -1).split([nope, value], dim=1)
    return w_uk, w_uv


def absorb_ref(q_THW: Tensor, w_uk: Tensor, cos_sin_PR: Tensor, positions_T: Tensor) -> Tensor:
    """q [T, H, N+R], W_UK [H, N, C] -> (q_nope @ W_UK, rotated q_rope): [T, H, C+R]."""
    nope, rope = q_THW.float().split([w_uk.shape[1], cos_sin_PR.shape[1]], dim=-1)
    rotated = rotate_ref(rope, cos_sin_PR[positions_T.long()][:, None, :])
    return torch.cat([torch.einsum("thn,hnc->thc", nope, w_uk), rotated], dim=-1)


def mla_attention_ref(
    q_THX: Tensor,
    pages: Tensor,
    page_table_BP: Tensor,
    sequence_T: Tensor,
    positions_T: Tensor,
    scale: float,
    latent: int,
) -> Tensor:
    """Softmax of scale * q.k over the row's own sequence, positions 0..its own -> [T, H, C].

    q_THX: float32 [T, H, X]. pages: float32 [P, 64, X] or FP8; unused slots are never seen.
    page_table_BP: int32, pages of each sequence in order. sequence_T: int32 row of that table.
    positions_T: int32. latent: C, the part of X that is also the value.
    """
    u_THC = q_THX.new_zeros(*q_THX.shape[:2], latent)
    page_tokens = pages.shape[1]
    for b in sequence_T.unique().tolist():
        rows = (sequence_T == b).nonzero()[:, 0]
        length = int(positions_T[rows].max()) + 1
        used = page_table_BP[b, : -(-length // page_tokens)].long()
        keys = read_pages_ref(pages[used], latent, q_THX.shape[2] - latent)
        keys = keys.flatten(0, 1)[:length].to(q_THX.dtype)
        score = torch.einsum("thx,sx->ths", q_THX[rows], keys) * scale
        hidden = torch.arange(length)[None, :] > positions_T[rows][:, None]
        score = score.masked_fill(hidden[:, None, :], float("-inf"))
        u_THC[rows] = torch.einsum("ths,sc->thc", score.softmax(-1), keys[:, :latent])
    return u_THC


def unabsorb_ref(u_THC: Tensor, w_uv: Tensor) -> Tensor:
    """Latents [T, H, C], W_UV [H, V, C] -> head outputs side by side [T, H*V]."""
    return torch.einsum("thc,hvc->thv", u_THC, w_uv).flatten(1)
