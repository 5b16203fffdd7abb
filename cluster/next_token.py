"""From logits to the next token of each sequence (spec section 6.1).

Penalties, logit bias, the masks of undefined and banned ids, the grammar's mask, then the draw.
Every row is treated alone, so that no sequence's token depends on another's. Drafts are drawn by
the same rules with the same noise, so that a good draft is the very token that will be chosen.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from concurrent.futures import Future
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayseek.cluster.grammar import GrammarCompiler
from rayseek.cluster.request import Token
from rayseek.cluster.sequence import Place
from rayseek.kernels.sampler import Drawn, Edit, Row, Sampler

MASKS_KEPT = 16  # masks of banned ids; an API needs two or three
NO_TOKEN = "no token may follow: the grammar and the banned or barred ids exclude each other"

GrammarMasks = Future[NDArray[np.uint8]]  # one row per sequence that has a matcher


def masks_at(places: Rows[Place], grammars: GrammarCompiler | None) -> GrammarMasks | None:
    """Begin to make the masks of those places that have a grammar."""
    matchers = [place.matcher for place in places if place.matcher is not None]
    return grammars.masks(matchers) if grammars and matchers else None


class TokenChooser:
    """undefined_ids: ids that have logits but no token; they are never chosen (spec 5.1)."""

    def __init__(self, undefined_ids: list[int], sampler: Sampler) -> None:
        self.undefined = torch.tensor(undefined_ids, dtype=torch.int64)
        self._sampler = sampler
        self._masks: dict[tuple[int, ...], Tensor] = {}  # by banned ids

    def choose(
        self,
        places: Rows[Place],
        logits_RV: Tensor,
        grammar: GrammarMasks | None,
        logprobs: bool = True,
    ) -> list[Token | str]:
        """A token per row of logits (consumed), or the reason why this place gets none.

        logprobs: False leaves them out even where the request wants them.
        """
        rows = self.rows(places, logits_RV.shape[1], logits_RV.device, grammar, logprobs)
        drawn = iter(self._sampler.draw(logits_RV, rows))
        return [
            _token(place, row, each)
            for place, row in zip(places, rows, strict=True)
            for each in islice(drawn, 1 + place.more)
        ]

    def rows(
        self,
        places: Rows[Place],
        vocab: int,
        device: torch.device,
        grammar: GrammarMasks | None = None,
        logprobs: bool = False,
    ) -> list[Row]:
        """What the sampler is told of each place."""
        allowed = iter(grammar.result()) if grammar is not None else None
        rows = []
        for place in places:
            p = place.sequence.request.sampling
            bound = allowed is not None and place.matcher is not None
            rows.append(
                Row(
                    place.draw(),
                    self._mask(p.banned_ids, vocab, device),
                    edits(place),
                    next(allowed) if bound and allowed is not None else None,
                    p.logprobs if logprobs else None,
                    place.more,
                )
            )
        return rows

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


def _token(place: Place, row: Row, drawn: Drawn) -> Token | str:
    if drawn.id is None:
        return "the model's logits are not finite"
    if place.matcher and (error := place.grammar_error()):  # in error, it lets EOS pass
        return error
    if row.allowed_V is not None and not row.allowed_V[drawn.id]:
        return NO_TOKEN
    return Token(drawn.id, drawn.logprob, drawn.top)


def edits(place: Place) -> tuple[Edit, ...]:
    """Penalties, then logit bias, then stop tokens barred before min_tokens (spec 6.1).

    Frequency and presence count emitted tokens; repetition also counts the prompt.
    """
    p = place.sequence.request.sampling
    found: list[Edit] = []

    if place.sequence.seen is not None:
        ids_N, _ = place.sequence.seen.with_drafts(place.drafts)
        found.append(Edit(ids_N, torch.full(ids_N.shape, p.repetition_penalty), penalty=True))
    if p.frequency_penalty or p.presence_penalty:
        ids_N, counts_N = place.sequence.emitted.with_drafts(place.drafts)
        found.append(Edit(ids_N, -(counts_N * p.frequency_penalty + p.presence_penalty)))
    if p.logit_bias:
        ids, values = zip(*p.logit_bias, strict=True)
        found.append(Edit(torch.tensor(ids), torch.tensor(values, dtype=torch.float32)))
    if p.min_tokens and place.num_emitted < p.min_tokens and p.stop_token_ids:
        ids_N = torch.tensor(p.stop_token_ids)
        found.append(Edit(ids_N, torch.full(ids_N.shape, -torch.inf)))
    return tuple(found)
