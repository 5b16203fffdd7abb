"""A model whose experts are spread over a unit: every forward and draft is a pass of the unit."""

from __future__ import annotations

from torch import Tensor

from rayseek.cluster.agreement import Kind
from rayseek.cluster.participant import Participant
from rayseek.model.batch import Batch
from rayseek.model.cached_model import CachedModel, Passed


class UnitModel:
    """The engine's model on a rank that is not alone; see `CachedModel` for what passes compute."""

    def __init__(self, model: CachedModel, participant: Participant) -> None:
        self._model, self._participant = model, participant
        self.drafts, self.cache = model.drafts, model.cache
        self.vocab_size = model.vocab_size

    def forward(self, batch: Batch) -> Passed:
        part = self._participant

        def work() -> Passed:
            return self._model.forward(batch, part.micro_batches)

        return part.run(Kind.FORWARD, len(batch.ids_T), work)

    def draft(self, batch: Batch, hidden_TD: Tensor) -> Passed:
        return self._participant.run(
            Kind.DRAFT, len(batch.out_rows_R), lambda: self._model.draft(batch, hidden_TD)
        )

    def drafts_ahead(self, *_: object) -> None:
        """Each is a pass of the unit."""

    def remember(self, batch: Batch, hidden_TD: Tensor) -> None:
        self._model.remember(batch, hidden_TD)
