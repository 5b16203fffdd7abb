"""How many rows each expert gets lately: a moving average that the balancer is fed with.

Owns the counters of one unit and the judgement whether a rebalance pays. No clock: who calls says
how much time has passed.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from rayseek.cluster.placement import ExpertPlacement, Loads, holder_loads


class ExpertLoad:
    """Rows per (MoE layer, expert); what is older than `half_life_s` counts half."""

    def __init__(self, layers: Iterable[int], experts: int, half_life_s: float) -> None:
        self._rows = {layer: np.zeros(experts) for layer in layers}
        self._half_life_s = half_life_s

    @property
    def rows(self) -> Loads:
        """The average rows of each layer's experts; only proportions mean something."""
        return {layer: row.tolist() for layer, row in self._rows.items()}

    def age(self, seconds: float) -> None:
        """Let time pass."""
        for row in self._rows.values():
            row *= 0.5 ** (seconds / self._half_life_s)

    def add(self, placement: ExpertPlacement, holder: int, rows: NDArray[np.int64]) -> None:
        """Count the rows [MoE layers, slots of a holder] that `holder` got in some passes."""
        for layer, counts in zip(placement.slots, rows, strict=True):
            np.add.at(self._rows[layer], list(placement.experts_of(holder, layer)), counts)


def imbalance(placement: ExpertPlacement, loads: Loads) -> float:
    """Time of the MoE layers over that of a perfect balance: 1 is perfect, 1 without any rows.

    A layer takes as long as its busiest holder, so maxima are summed over layers, not loads.
    """
    of_holders = holder_loads(placement, loads)
    mean = float(of_holders.mean(1).sum())
    return float(of_holders.max(1).sum()) / mean if mean else 1.0


def pays(now: ExpertPlacement, then: ExpertPlacement, loads: Loads, threshold: float) -> bool:
    """Whether going from `now` to `then` shortens the MoE layers by more than `threshold`."""
    return imbalance(now, loads) > imbalance(then, loads) * (1 + threshold)
