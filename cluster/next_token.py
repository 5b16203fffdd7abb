"""From logits to the next token of each sequence (spec section 6.1).

Penalties, logit bias, the masks of undefined and banned ids, the grammar's mask, then the draw.
Every row is treated alone, so that no sequence's token depends on another's.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from concurrent.futures import Future

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayseek.cluster.request import Token
from rayseek.cluster.sequence import Sequence
from rayseek.kernels.sample import sample, top_logprobs

MASKS_KEPT = 16  # masks of banned ids; an API needs two or three
NO_TOKEN = "no token may follow: the grammar and the banned or barred ids exclude each other"

GrammarMasks = Future[NDArray[np.uint8]]  # one row per sequence that has a matcher


class TokenChooser:
    """undefined_ids: ids that have logits but no token; they are never chosen (spec 5.1)."""

    def __init__(self, undefined_ids: list[int]) -> None:
        self.undefined = torch.tensor(undefined_ids, dtype=torch.int64)
        self._masks: dict[tuple[int, ...], Tensor] = {}  # by banned ids

    def choose(
        self, ready: Rows[Sequence], logits_RV: Tensor, grammar: GrammarMasks | None
    ) -> list[Token | str]:
        """A token per row of logits (consumed), or the reason why this sequence gets none."""
        finite = torch.isfinite(logits_RV.sum(dim=1)).tolist()
        raw = {
            r: logits_RV[r].clone()
            for r, s in enumerate(ready)
            if s.request.sampling.logprobs is not None
        }
        bound = [r for r, s in enumerate(ready) if s.matcher is not None]
        allowed_MV = grammar.result() if grammar is not None else None
        for r, sequence in enumerate(ready):
            adjust_logits(logits_RV[r], sequence)
        banned = [s.request.sampling.banned_ids for s in ready]
        masks = {ids: self._mask(ids, logits_RV.shape[1]) for ids in set(banned)}
        shared = len(masks) == 1  # by all rows, as almost always
        logits_RV += masks[banned[0]] if shared else torch.stack([masks[b] for b in banned])
        if allowed_MV is not None:
            barred_MV = torch.from_numpy(allowed_MV) == 0
            if len(bound) == len(ready):
                logits_RV.masked_fill_(barred_MV, -torch.inf)
            else:
                logits_RV[bound] = logits_RV[bound].masked_fill_(barred_MV, -torch.inf)
        ids = sample(logits_RV, [s.draw() for s in ready])

        tokens: list[Token | str] = []
        for r, (sequence, token) in enumerate(zip(ready, ids, strict=True)):
            if not finite[r]:
                tokens.append("the model's logits are not finite")
            elif r in raw:
                logprob, top = top_logprobs(raw[r], token, sequence.request.sampling.logprobs or 0)
                tokens.append(Token(token, logprob, tuple(top)))
            else:
                tokens.append(Token(token))
        if allowed_MV is not None:
            for m, r in enumerate(bound):
                error = ready[r].grammar_error()  # a matcher in error lets EOS pass
                if finite[r] and (error or not allowed_MV[m, ids[r]]):
                    tokens[r] = error or NO_TOKEN
        return tokens

    def _mask(self, banned: tuple[int, ...], vocab: int) -> Tensor:
        """float32 [V]: -inf where an id has no token or is banned, else 0. Kept, for few differ."""
        mask_V = self._masks.get(banned)
        if mask_V is None:
            mask_V = torch.zeros(vocab)
            mask_V[self.undefined] = -torch.inf
            mask_V[list(banned)] = -torch.inf
            if len(self._masks) >= MASKS_KEPT:
                self._masks.clear()
            self._masks[banned] = mask_V
        return mask_V


def adjust_logits(logits_V: Tensor, sequence: Sequence) -> None:
    """Penalties, then logit bias, then stop tokens barred before min_tokens (spec 6.1), in place.

    Frequency and presence count emitted tokens; repetition also counts the prompt.
    """
    p = sequence.request.sampling
    if p.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(sequence.ids)), dtype=torch.int64)
        values = logits_V[seen]
        logits_V[seen] = torch.where(
            values > 0, values / p.repetition_penalty, values * p.repetition_penalty
        )
    if sequence.counts and (p.frequency_penalty or p.presence_penalty):
        ids = torch.tensor(list(sequence.counts), dtype=torch.int64)
        counts = torch.tensor(list(sequence.counts.values()), dtype=torch.float32)
        logits_V[ids] -= counts * p.frequency_penalty + p.presence_penalty
    if p.logit_bias:
        ids = torch.tensor([i for i, _ in p.logit_bias], dtype=torch.int64)
        logits_V[ids] += torch.tensor([bias for _, bias in p.logit_bias])
    if sequence.num_emitted < p.min_tokens and p.stop_token_ids:
        logits_V[torch.tensor(p.stop_token_ids, dtype=torch.int64)] = -torch.inf
