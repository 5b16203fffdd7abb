"""Drafting: after a step, the MTP module guesses the tokens of the next one.

A row of the module is a hidden state of the main model and the token after it; its out row is drawn
from like one of the target's (`next_token.py`). Which rows the module learns of is decided here;
how many tokens ahead, in `speculation.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Rows
from functools import reduce
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from rayseek.cluster.grammar import GrammarCompiler
from rayseek.cluster.next_token import TokenChooser, masks_at
from rayseek.cluster.request import Token
from rayseek.cluster.sequence import Place, Sequence
from rayseek.kernels.sampler import Row
from rayseek.model.batch import PAGE_TOKENS, Batch
from rayseek.model.cached_model import Passed

Running: TypeAlias = Mapping[str, Sequence]  # by request id


class DraftModel(Protocol):
    """The draft module as `model/cached_model.py` has it."""

    @property
    def vocab_size(self) -> int: ...

    def draft(self, batch: Batch, hidden_TD: Tensor) -> Passed: ...

    def drafts_ahead(
        self, batch: Batch, hidden_TD: Tensor, draws: Rows[Row], most: list[int]
    ) -> list[list[int]] | None: ...

    def remember(self, batch: Batch, hidden_TD: Tensor) -> None: ...


class Stepped(NamedTuple):
    """Rows that a step has computed: hidden states of the tokens from `start` on."""

    sequence: Sequence
    start: int
    hidden_TD: Tensor


class Drafter:
    """Fills `Sequence.drafts`, with the target's own way of choosing tokens."""

    def __init__(self, chooser: TokenChooser, grammars: GrammarCompiler | None) -> None:
        self._chooser, self._grammars = chooser, grammars

    def draft(
        self, model: DraftModel, depth: int, stepped: Rows[Stepped], running: Running
    ) -> None:
        """Drafts, `depth` at most, for those sequences of the step that can use them.

        All rows of `stepped` are learned: their latents are written. The next step brings a token
        by itself, so the last one allowed is never drafted.
        """
        most = [
            min(depth, room(s)) if s.request.id in running and s.computed == len(s.ids) - 1 else 0
            for s, _, _ in stepped
        ]
        batch = Batch.of_sequences(
            [s.ids[start + 1 : start + 1 + len(rows_TD)] for s, start, rows_TD in stepped],
            [start for _, start, _ in stepped],
            [s.pages for s, _, _ in stepped],
            [int(m > 0) for m in most],
        )
        first_TD = stepped[0].hidden_TD
        hidden_TD = first_TD if len(stepped) == 1 else torch.cat([h_TD for _, _, h_TD in stepped])
        drafting = [s for (s, _, _), m in zip(stepped, most, strict=True) if m > 0]
        if not drafting:
            model.remember(batch, hidden_TD)
        elif not self._at_once(model, batch, hidden_TD, drafting, [m for m in most if m > 0]):
            self._one_by_one(model, batch, hidden_TD, drafting, depth)

    def _at_once(
        self,
        model: DraftModel,
        batch: Batch,
        hidden_TD: Tensor,
        drafting: Rows[Sequence],
        most: list[int],
    ) -> bool:
        """In one call, where the model can do that and no draft decides how the next is drawn."""
        places = [s.place for s in drafting]
        if not all(place.decides_nothing for place in places):
            return False
        rows = self._chooser.rows(places, model.vocab_size, hidden_TD.device)
        found = model.drafts_ahead(batch, hidden_TD, rows, most)
        if found is None:
            return False
        for s, drafts in zip(drafting, found, strict=True):
            s.drafts = drafts
        return True

    def _one_by_one(
        self,
        model: DraftModel,
        batch: Batch,
        hidden_TD: Tensor,
        drafting: Rows[Sequence],
        depth: int,
    ) -> None:
        for number in range(depth):
            if number:
                ids = [[s.drafts[-1]] for s in drafting]
                starts = [s.computed - 1 + number for s in drafting]
                batch = Batch.of_sequences(ids, starts, [s.pages for s in drafting])
            places = [reduce(Place.then, s.drafts, s.place) for s in drafting]
            masks = masks_at(places, self._grammars)
            passed = model.draft(batch, hidden_TD)
            tokens = self._chooser.choose(places, passed.logits_RV, masks, logprobs=False)
            for s, token in zip(drafting, tokens, strict=True):
                if isinstance(token, Token):
                    s.drafts.append(token.id)
            on = [r for r, s in enumerate(drafting) if len(s.drafts) == number + 1 < room(s)]
            assert passed.normed_TD is not None
            hidden_TD = passed.normed_TD
            if len(on) < len(drafting):
                hidden_TD, drafting = hidden_TD[on], [drafting[r] for r in on]
            if not drafting:
                return


def learned_to(known: int, computed: int, depth: int) -> int:
    """Before which token the module learns of those computed in a step; drafts that fell are
    behind `computed`, drafts at all behind `known`.

    While nobody drafts, only what may be shared: full pages of a prompt. A gap in what it has
    learned makes later drafts worse, and no token different.
    """
    if depth:
        return computed
    return min(computed, known // PAGE_TOKENS * PAGE_TOKENS)


def room(s: Sequence) -> int:
    """How many drafts a sequence can use and has slots for."""
    usable = s.request.sampling.max_tokens - s.num_emitted - 1
    return min(usable, len(s.pages) * PAGE_TOKENS - s.computed + 1)
