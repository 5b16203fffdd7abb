"""From logits to the next token of each sequence (spec section 6.1).

Penalties, logit bias, the masks of undefined and banned ids, the grammar's mask, then the draw.
Every row is treated alone, so that no sequence's token depends on another's. Drafts are drawn by
the same rules with the same noise, so that a good draft is the very token that will be chosen.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Rows
from concurrent.futures import Future

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayseek.cluster.grammar import GrammarCompiler
from rayseek.cluster.request import Token
from rayseek.cluster.sequence import Place
from rayseek.kernels.sample import sample, top_logprobs

MASKS_KEPT = 16  # masks of banned ids; an API needs two or three
NO_TOKEN = "no token may follow: the grammar and the banned or barred ids exclude each other"

GrammarMasks = Future[NDArray[np.uint8]]  # one row per sequence that has a matcher


def masks_at(places: Rows[Place], grammars: GrammarCompiler | None) -> GrammarMasks | None:
    """Begin to make the masks of those places that have a grammar."""
    matchers = [place.matcher for place in places if place.matcher is not None]
    return grammars.masks(matchers) if grammars and matchers else None


class TokenChooser:
    """undefined_ids: ids that have logits but no token; they are never chosen (spec 5.1)."""

    def __init__(self, undefined_ids: list[int]) -> None:
        self.undefined = torch.tensor(undefined_ids, dtype=torch.int64)
        self._masks: dict[tuple[int, ...], Tensor] = {}  # by banned ids

    def choose(
        self, places: Rows[Place], logits_RV: Tensor, grammar: GrammarMasks | None
    ) -> list[Token | str]:
        """A token per row of logits (consumed), or the reason why this place gets none."""
        raw = {
            r: logits_RV[r].clone()
            for r, place in enumerate(places)
            if place.sequence.request.sampling.logprobs is not None
        }
        tokens: list[Token | str] = []
        for r, drawn in enumerate(self.draw(places, logits_RV, grammar)):
            if isinstance(drawn, str):
                tokens.append(drawn)
            elif r in raw:
                count = places[r].sequence.request.sampling.logprobs or 0
                logprob, top = top_logprobs(raw[r], drawn, count)
                tokens.append(Token(drawn, logprob, tuple(top)))
            else:
                tokens.append(Token(drawn))
        return tokens

    def draw(
        self, places: Rows[Place], logits_RV: Tensor, grammar: GrammarMasks | None
    ) -> list[int | str]:
        """The same as a bare token id."""
        finite_R, device = torch.isfinite(logits_RV.sum(dim=1)), logits_RV.device
        bound = [r for r, place in enumerate(places) if place.matcher is not None]
        allowed_MV = grammar.result() if grammar is not None else None
        for r, place in enumerate(places):
            adjust_logits(logits_RV[r], place)
        banned = [place.sequence.request.sampling.banned_ids for place in places]
        masks = {ids: self._mask(ids, logits_RV.shape[1], device) for ids in set(banned)}
        shared = len(masks) == 1  # by all rows, as almost always
        logits_RV += masks[banned[0]] if shared else torch.stack([masks[b] for b in banned])
        if allowed_MV is not None:
            barred_MV = (torch.from_numpy(allowed_MV) == 0).to(device)
            if len(bound) == len(places):
                logits_RV.masked_fill_(barred_MV, -torch.inf)
            else:
                logits_RV[bound] = logits_RV[bound].masked_fill_(barred_MV, -torch.inf)
        ids = sample(logits_RV, [place.draw() for place in places])
        finite, drawn = finite_R.tolist(), list[int | str](ids)
        for m, r in enumerate(bound):
            error = places[r].grammar_error()  # a matcher in error lets EOS pass
            if error or (allowed_MV is not None and not allowed_MV[m, ids[r]]):
                drawn[r] = error or NO_TOKEN
        return [
            token if finite[r] else "the model's logits are not finite"
            for r, token in enumerate(drawn)
        ]

    def _mask(self, banned: tuple[int, ...], vocab: int, device: torch.device) -> Tensor:
        """float32 [V]: -inf where an id has no token or is banned, else 0. Kept, for few differ."""
        mask_V = self._masks.get(banned)
        if mask_V is None:
            mask_V = torch.zeros(vocab)
            mask_V[self.undefined] = -torch.inf
            mask_V[list(banned)] = -torch.inf
            if len(self._masks) >= MASKS_KEPT:
                self._masks.clear()
            mask_V = self._masks[banned] = mask_V.to(device)
        return mask_V


def adjust_logits(logits_V: Tensor, place: Place) -> None:
    """Penalties, then logit bias, then stop tokens barred before min_tokens (spec 6.1), in place.

    Frequency and presence count emitted tokens; repetition also counts the prompt.
    """
    p, device = place.sequence.request.sampling, logits_V.device

    def index(ids: Iterable[int]) -> Tensor:
        return torch.tensor(list(ids), dtype=torch.int64, device=device)

    if p.repetition_penalty != 1.0:
        seen = index(sorted({*place.sequence.ids, *place.drafts}))
        values = logits_V[seen]
        logits_V[seen] = torch.where(
            values > 0, values / p.repetition_penalty, values * p.repetition_penalty
        )
    if p.frequency_penalty or p.presence_penalty:
        seen_counts = place.counts
        counts = torch.tensor(list(seen_counts.values()), dtype=torch.float32, device=device)
        logits_V[index(seen_counts)] -= counts * p.frequency_penalty + p.presence_penalty
    if p.logit_bias:
        biases = torch.tensor([bias for _, bias in p.logit_bias], device=device)
        logits_V[index(i for i, _ in p.logit_bias)] += biases
    if place.num_emitted < p.min_tokens and p.stop_token_ids:
        logits_V[index(p.stop_token_ids)] = -torch.inf
