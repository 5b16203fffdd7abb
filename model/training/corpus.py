"""Tokenised documents on disk: a folder of shards, each one safetensors file.

A shard holds `ids` uint16 [N], all documents back to back; `weights` uint8 [N], how much the loss
of *predicting* that token counts (x / 255; 0 is given text, such as a prompt); `starts` int64
[D + 1], where each document begins, and the end. Shards are read in the order of their numbers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

FULL_WEIGHT = 255  # a token whose prediction counts once
MAX_ID = 2**16 - 1

Document = tuple[Sequence[int], Sequence[int]]  # ids, and the weights of predicting them


@dataclass(frozen=True, slots=True)
class Shard:
    """The documents of one file."""

    ids: NDArray[np.uint16]
    weights: NDArray[np.uint8]
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.starts) - 1

    def document(self, index: int) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
        """The ids and weights of one document."""
        part = slice(int(self.starts[index]), int(self.starts[index + 1]))
        return self.ids[part], self.weights[part]


def shard_path(folder: str | Path, number: int) -> Path:
    """Where shard `number` (from 0) of a corpus lies."""
    return Path(folder) / f"shard-{number:05}.safetensors"


def shard_paths(folder: str | Path) -> list[Path]:
    """The shards that are there, in order."""
    return sorted(Path(folder).glob("shard-*.safetensors"))


def write_shard(path: str | Path, documents: list[Document]) -> None:
    """Write one shard; the file appears under its name only when it is complete.

    Raises ValueError for a document that is empty, whose weights are not as many as its ids, or
    with a value out of range.
    """
    for number, (ids, weights) in enumerate(documents):
        if len(ids) != len(weights) or not len(ids):
            raise ValueError(
                f"document {number}: {len(ids)} ids and {len(weights)} weights; "
                "it needs one weight for each id, and at least one"
            )
        if min(ids) < 0 or max(ids) > MAX_ID or min(weights) < 0 or max(weights) > FULL_WEIGHT:
            raise ValueError(f"document {number}: ids are 0..{MAX_ID}, weights 0..{FULL_WEIGHT}")
    starts = np.zeros(len(documents) + 1, np.int64)
    np.cumsum([len(ids) for ids, _ in documents], out=starts[1:])
    ids_N, weights_N = np.empty(starts[-1], np.uint16), np.empty(starts[-1], np.uint8)
    for (ids, weights), start in zip(documents, starts[:-1].tolist(), strict=True):
        ids_N[start : start + len(ids)] = ids
        weights_N[start : start + len(ids)] = weights
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    save_file({"ids": ids_N, "weights": weights_N, "starts": starts}, draft)
    draft.rename(path)


def read_shard(path: str | Path) -> Shard:
    """Read one shard. Raises ValueError if its arrays do not fit together."""
    arrays = load_file(path)
    if missing := {"ids", "weights", "starts"} - arrays.keys():
        raise ValueError(f"{path}: no {', '.join(sorted(missing))}; not a shard of a corpus")
    ids, weights, starts = arrays["ids"], arrays["weights"], arrays["starts"]
    if (
        [ids.dtype.name, weights.dtype.name, starts.dtype.name] != ["uint16", "uint8", "int64"]
        or len(ids) != len(weights)
        or not len(starts)
        or starts[0] != 0
        or starts[-1] != len(ids)
        or (np.diff(starts) <= 0).any()
    ):
        raise ValueError(f"{path}: its ids, weights and starts do not fit together; write it again")
    return Shard(ids, weights, starts)
