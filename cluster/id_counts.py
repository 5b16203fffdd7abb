"""How often ids have come in a sequence, for penalties, as arrays that grow.

Collected anew for each token, they would cost the more the longer the context: 12 ms at 100,000
ids, on the engine's thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

ROOM = 16  # at least so many more ids, when there is none left


class IdCounts:
    """Of the given ids, and of those added later."""

    def __init__(self, ids: Iterable[int]) -> None:
        counts = Counter(ids)
        self._places = {token: place for place, token in enumerate(counts)}
        self._ids_N = np.fromiter(counts, np.int64, len(counts))
        self._counts_N = np.fromiter(counts.values(), np.float32, len(counts))

    def add(self, token: int) -> None:
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._ids_N):
            room = max(ROOM, place)
            self._ids_N = np.concatenate([self._ids_N, np.zeros(room, np.int64)])
            self._counts_N = np.concatenate([self._counts_N, np.zeros(room, np.float32)])
        self._ids_N[place] = token
        self._counts_N[place] += 1

    def with_drafts(self, drafts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """int64 and float32 [N]: each id once, and how often it came, if these came as well.

        Good until the next `add`.
        """
        known = len(self._places)
        ids_N, counts_N = self._ids_N[:known], self._counts_N[:known]
        if drafts:
            new = [d for d in dict.fromkeys(drafts) if d not in self._places]
            ids_N = np.concatenate([ids_N, np.array(new, np.int64)])
            counts_N = np.concatenate([counts_N, np.zeros(len(new), np.float32)])
            for d in drafts:
                counts_N[known + new.index(d) if d in new else self._places[d]] += 1
        return torch.from_numpy(ids_N), torch.from_numpy(counts_N)
