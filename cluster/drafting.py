"""Drafting: after a step, the MTP module guesses the tokens of the next one.

A row of the module is a hidden state of the main model and the token after it; its out row is drawn
from like one of the target's (`next_token.py`). Which rows there are, and when the module learns of
those that nobody drafts from, is decided here; how many tokens ahead, in `speculation.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Rows
from time import perf_counter
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from rayseek.cluster.grammar import GrammarCompiler
from rayseek.cluster.next_token import TokenChooser, masks_at
from rayseek.cluster.request import Token
from rayseek.cluster.sequence import Sequence
from rayseek.cluster.speculation import DraftMeter
from rayseek.model.batch import PAGE_TOKENS, Batch
from rayseek.model.cached_model import Passed

LEARN_ROWS = 32  # of a sequence, which the draft module learns at once

Running: TypeAlias = Mapping[str, Sequence]  # by request id


class DraftModel(Protocol):
    """The draft module as `model/cached_model.py` has it."""

    @property
    def hidden_size(self) -> int: ...

    def draft(self, batch: Batch, hidden_TD: Tensor) -> Passed: ...

    def remember(self, batch: Batch, hidden_TD: Tensor) -> None: ...


class Drafter:
    """Fills `Sequence.drafts`, with the target's own way of choosing tokens."""

    def __init__(
        self,
        chooser: TokenChooser,
        grammars: GrammarCompiler | None,
        meter: DraftMeter,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self._chooser, self._grammars = chooser, grammars
        self._meter, self._now = meter, clock

    def draft(
        self, model: DraftModel, depth: int, stepped: Rows[Sequence], running: Running
    ) -> None:
        """`depth` passes after a step of `stepped`: drafts for the sequences that can use them.

        The next step brings a token by itself, so the last one allowed is never drafted.
        """
        drafting = [
            s for s in stepped
            if depth and s.request.id in running
            and s.computed == len(s.ids) - 1 and wants_more(s, 0)
        ]  # fmt: skip
        if not len(drafting) == len(stepped) == len(running):
            learn(model, stepped, running, drafting)
        hidden_TD = torch.empty(0, model.hidden_size)
        for number in range(depth):
            began = self._now()
            if number:
                ids = [[s.drafts[-1]] for s in drafting]
                starts = [s.computed - 1 + number for s in drafting]
            else:  # with the rows that it has to learn of before
                ids, starts, hidden_TD = taken(drafting, hidden_TD)
            batch = Batch.of_sequences(ids, starts, [s.pages for s in drafting], [1] * len(ids))
            places = [s.places(number)[-1] for s in drafting]
            masks = masks_at(places, self._grammars)
            passed = model.draft(batch, hidden_TD)
            if not drafting:
                continue
            tokens = self._chooser.choose(places, passed.logits_RV, masks, logprobs=False)
            for s, token in zip(drafting, tokens, strict=True):
                if isinstance(token, Token):
                    s.drafts.append(token.id)
            if len(batch.ids_T) <= len(drafting) * (1 + self._meter.most):  # else many of a prompt
                self._meter.draft_took(len(drafting), self._now() - began)
            if number + 1 == depth:
                break
            on = [r for r, s in enumerate(drafting) if wants_more(s, number + 1)]
            assert passed.normed_TD is not None
            hidden_TD = passed.normed_TD
            if len(on) < len(drafting):
                hidden_TD, drafting = hidden_TD[on], [drafting[r] for r in on]


def learn(
    model: DraftModel, stepped: Rows[Sequence], running: Running, drafting: Rows[Sequence]
) -> None:
    """Write the draft module's latents of the new rows of those that do not draft now.

    A row of the module is a hidden state and the token after it, known by now. While nobody
    drafts, rows wait until there are enough to be cheap, or until a sequence has ended: its
    pages may be somebody's prefix.
    """
    if not drafting and not any(
        s.computed - s.learned >= LEARN_ROWS or s.request.id not in running for s in stepped
    ):
        return
    later = {s.request.id for s in drafting}
    known = [s for s in running.values() if s.unlearned and s.request.id not in later]
    known += [s for s in stepped if s.request.id not in running and s.unlearned]
    if known:
        ids, starts, hidden_TD = taken(known, torch.empty(0, model.hidden_size))
        batch = Batch.of_sequences(ids, starts, [s.pages for s in known], [0] * len(ids))
        model.remember(batch, hidden_TD)


def taken(sequences: Rows[Sequence], none_TD: Tensor) -> tuple[list[list[int]], list[int], Tensor]:
    """All rows that the module has not learned of these: their tokens, starts and hidden states."""
    rows = [s.take_unlearned() for s in sequences]
    hidden = [part for _, _, parts in rows for part in parts]
    hidden_TD = hidden[0] if len(hidden) == 1 else torch.cat(hidden) if hidden else none_TD
    return [ids for ids, _, _ in rows], [start for _, start, _ in rows], hidden_TD


def wants_more(s: Sequence, drafts: int) -> bool:
    """Whether a sequence with that many drafts can use one more, and has a slot for it."""
    usable = s.request.sampling.max_tokens - s.num_emitted - 1
    room = len(s.pages) * PAGE_TOKENS - s.computed
    return len(s.drafts) == drafts < usable and drafts <= room
