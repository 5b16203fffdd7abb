"""Counts the rows of each expert where all experts are on one rank, for the cluster page.

Where they are spread, the exchange counts. Only on a CPU: reading choices back from a GPU would
make every layer wait for it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayseek.cluster.plan import ExpertRows
from rayseek.model.config import ModelConfig
from rayseek.model.moe import Experts, ExpertsHere, ExpertsUnderway


class ExpertTally:
    """Owned by the engine's thread; `take` is for others."""

    def __init__(self) -> None:
        self._rows: dict[int, NDArray[np.int64]] = {}
        self._taken: dict[int, NDArray[np.int64]] = {}

    def counted(
        self, config: ModelConfig, make: Callable[[str], Experts]
    ) -> Callable[[str], Experts]:
        """The experts of a layer ("model.layers.3") that `make` makes, counted."""
        layers = range(config.first_k_dense_replace, config.stored_layers)
        self._rows = {n: np.zeros(config.n_routed_experts, np.int64) for n in layers}

        def made(prefix: str) -> Experts:
            return _Counted(make(prefix), self._rows[int(prefix.rpartition(".")[2])])

        return made

    def take(self) -> ExpertRows | None:
        """Rows of each expert since the last call, layers ascending; None: nothing is counted."""
        now = {layer: rows.copy() for layer, rows in self._rows.items()}
        before, self._taken = self._taken, now
        if not now:
            return None
        return ExpertRows(0, np.stack([now[n] - before.get(n, 0) for n in now]))


class _Counted:
    def __init__(self, experts: Experts, rows_E: NDArray[np.int64]) -> None:
        self._experts, self._rows_E = experts, rows_E

    @property
    def here(self) -> ExpertsHere | None:
        inner = self._experts.here
        return inner and ExpertsHere(inner.packed, torch.from_numpy(self._rows_E))

    def begin(self, x_TD: Tensor, expert_TK: Tensor) -> ExpertsUnderway:
        self._rows_E += np.bincount(expert_TK.numpy().ravel(), minlength=len(self._rows_E))
        return self._experts.begin(x_TD, expert_TK)
