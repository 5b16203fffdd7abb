"""The next token: Gumbel noise that is a pure function of (seed, position, token id).

With such noise, drawing from softmax(logits / temperature) is an argmax of
logits / temperature + noise. A token therefore depends on nothing but its own request: not on the
batch, on the order of requests, or on how often the step was repeated.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_U32 = 0xFFFFFFFF
_U64 = 0xFFFFFFFFFFFFFFFF


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _U64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _U64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _U64
    return x ^ (x >> 31)


def noise_key(seed: int, position: int) -> tuple[int, int]:
    """Two 32-bit words for the draw of one token of one request."""
    mixed = _splitmix64(_splitmix64(seed & _U64) ^ position)
    return mixed >> 32, mixed & _U32


def _fold(x: Tensor, shift: int) -> Tensor:
    """x ^= x >> shift on the bits of int32 values, in place (torch's own shift keeps the sign)."""
    return x.bitwise_xor_((x >> shift).bitwise_and_((1 << (32 - shift)) - 1))


def signed(word: int) -> int:
    """A 32-bit word as the int32 of the same bits."""
    return word - (1 << 32) if word >> 31 else word


def gumbel_noise(keys: list[tuple[int, int]], vocab: int) -> Tensor:
    """float32 [R, V] standard Gumbel noise for R draws over V token ids.

    A 32-bit hash of (key, id) gives v in (0, 1); -log(-log1p(-v)) keeps full precision where it
    matters, at large noise (small v). int32 arithmetic wraps, which is what the hash wants.
    """
    key_R2 = torch.tensor([[signed(a), signed(b)] for a, b in keys], dtype=torch.int32)
    x = torch.arange(vocab, dtype=torch.int32).mul_(signed(0x9E3779B9)) + key_R2[:, :1]
    x = _fold(x, 16).mul_(signed(0x85EBCA6B)).add_(key_R2[:, 1:])
    x = _fold(_fold(x, 15).mul_(signed(0x846CA68B)), 16)
    high, low = (x >> 16).bitwise_and_(0xFFFF).to(torch.float32), x.bitwise_and_(0xFFFF)
    v = high.mul_(2.0**16).add_(low).add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return v.neg_().log1p_().neg_().log_().neg_()


class Draw(NamedTuple):
    """How to pick from one row of already penalised and masked logits."""

    temperature: float  # < 1e-5: greedy
    top_k: int
    top_p: float
    min_p: float
    seed: int
    position: int  # index in the sequence of the token being drawn

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5

    @property
    def filtered(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


def keep_mask(scaled_V: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """bool [V]: ids that survive top-k, then top-p, then min-p (spec section 6.1).

    scaled_V: float32 logits / temperature, -inf where masked. Ties at the edge of top-k and
    top-p go to the lowest id. The most likely id always survives.
    """
    order = torch.argsort(scaled_V, descending=True, stable=True)
    probs = torch.softmax(scaled_V[order], dim=0)
    keep = torch.ones_like(probs, dtype=torch.bool)
    if top_k > 0:
        keep[top_k:] = False
        probs = torch.where(keep, probs, 0.0)
        probs = probs / probs.sum()
    if top_p < 1.0:
        keep &= (probs.cumsum(0) - probs) < top_p
    if min_p > 0.0:
        keep &= probs >= min_p * probs[0]
    keep[0] = True
    return torch.zeros_like(keep).scatter_(0, order, keep)


def sample(logits_RV: Tensor, draws: list[Draw]) -> list[int]:
    """One token id per row. logits_RV: float32, consumed; ties go to the lowest id.

    On a GPU its kernels draw, and waiting for the ids is the one time the host waits.
    """
    if logits_RV.is_cuda:
        from rayseek.kernels.hopper.sample import draw

        return list(map(int, draw(logits_RV, draws).tolist()))
    noisy = [r for r, draw in enumerate(draws) if not draw.greedy]
    if noisy:
        rows = logits_RV[noisy] / torch.tensor([[draws[r].temperature] for r in noisy])
        for i, r in enumerate(noisy):
            if (d := draws[r]).filtered:
                rows[i].masked_fill_(~keep_mask(rows[i], d.top_k, d.top_p, d.min_p), -torch.inf)
        rows += gumbel_noise(
            [noise_key(draws[r].seed, draws[r].position) for r in noisy], rows.shape[1]
        )
        logits_RV[noisy] = rows
    return logits_RV.argmax(dim=1).tolist()


def top_logprobs(logits_V: Tensor, token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """log softmax of one row of unmodified logits: of `token`, and of the `count` most likely."""
    logprobs = torch.log_softmax(logits_V.to(torch.float32), dim=0)
    top: list[tuple[int, float]] = []
    if count:
        order = torch.argsort(logprobs, descending=True, stable=True)[:count]
        top = list(zip(order.tolist(), logprobs[order].tolist(), strict=True))
    return float(logprobs[token]), top
