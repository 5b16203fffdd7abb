"""The routed experts that one process holds: which, loaded from where, and copies for others.

`ExpertSlots` is what a placement gives a process, for all its MoE layers, and never changes. The
next placement's is made beside it (`ExpertStore.load`), sharing the experts that stay, while the
old one computes. An expert comes as a copy from a process that has it, or from the checkpoint; a
copy is checked against the digest that its sender took when it got the expert itself.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rayseek.kernels.ops import SplitOps
from rayseek.model.checkpoint import DTYPES, Checkpoint, Weights
from rayseek.model.inventory import SCALE_SUFFIX

log = logging.getLogger("rayseek.experts")

DIGEST_BYTES = 16
AT_ONCE = 4  # copies that are asked for
Key = tuple[int, int]  # layer, logical expert


@dataclass(frozen=True, slots=True)
class ExpertCopy:
    """One expert on its way: its tensors' checkpoint bytes back to back, and their digest."""

    data: bytes
    digest: bytes


Fetch = Callable[[int, int], ExpertCopy | None]
"""Asks others for (layer, expert); None: nobody can give it, so the checkpoint must. Called in
several threads."""


@dataclass(frozen=True, slots=True)
class _Held:
    packed: Any  # of this expert alone
    digest: bytes


@dataclass(frozen=True, slots=True)
class _Layer:
    """The experts of one layer: `packed` has them all, and is the only owner of their memory."""

    experts: tuple[int, ...]  # in each slot
    packed: Any
    digests: Mapping[int, bytes]


class ExpertsReleased(RuntimeError):
    """Somebody wanted to compute with experts whose memory went to their successors."""


class ExpertSlots:
    """The experts of a process by layer and slot; see ExpertStore.load."""

    def __init__(self, layers: Mapping[int, _Layer], ops: SplitOps) -> None:
        self.layers, self._ops = dict(layers), ops

    @property
    def lists(self) -> dict[int, tuple[int, ...]]:
        """For each layer the logical expert of each slot."""
        return {number: layer.experts for number, layer in self.layers.items()}

    def compute(self, layer: int, x_RW: Tensor, row_N: Tensor, slot_N: Tensor) -> Tensor:
        """Slot slot_N[i] of the layer applied to row row_N[i] (SplitOps.expert_rows); zeros for -1.

        Raises ExpertsReleased.
        """
        there = self.layers.get(layer)
        if there is None:
            raise ExpertsReleased(f"the experts of layer {layer} have been released")
        return self._ops.expert_rows(x_RW, row_N, slot_N, there.packed)

    def digest(self, layer: int, expert: int) -> bytes:
        """Of the expert's checkpoint bytes, taken when it came here; the same in every process."""
        return self.layers[layer].digests[expert]

    def held(self, layer: int, expert: int) -> _Held | None:
        """An expert of ours alone, in the memory that its layer owns; None: it is not here."""
        there = self.layers.get(layer)
        if there is None or expert not in there.digests:
            return None
        part = self._ops.expert_part(there.packed, there.experts.index(expert))
        return _Held(part, there.digests[expert])


class ExpertStore:
    """Loads experts of `checkpoint`, packed for `ops`: one caller at a time. Others may ask for
    copies meanwhile.

    taken: how many experts and bytes were copied from others and read from the checkpoint so
    far, and how many copies were refused, because they came damaged.
    """

    def __init__(self, checkpoint: Checkpoint, ops: SplitOps) -> None:
        self._checkpoint, self._ops = checkpoint, ops
        self._digests: dict[Key, bytes] = {}
        self.taken = dict.fromkeys(("copied", "copied_bytes", "read", "read_bytes", "refused"), 0)

    def load(
        self,
        lists: Mapping[int, Sequence[int]],
        before: ExpertSlots | None = None,
        fetch: Fetch | None = None,
        release: bool = False,
    ) -> ExpertSlots:
        """lists: for each MoE layer the logical expert of each slot.

        What `before` has is taken from there, then what `fetch` gives, the rest is read. A layer
        that stays as it is shares its memory with `before`; another one is made beside it, one
        layer after the other. release: each layer of `before` ends when it is not needed here any
        more. Raises CheckpointError for what cannot be read.
        """
        layers = {}
        for layer, experts in lists.items():
            same = before.layers.get(layer) if before is not None else None
            if same is None or same.experts != tuple(experts):
                same = self._layer(layer, experts, before, fetch)
            layers[layer] = same
            if release and before is not None:
                before.layers.pop(layer, None)
        return ExpertSlots(layers, self._ops)

    def _layer(
        self, layer: int, experts: Sequence[int], before: ExpertSlots | None, fetch: Fetch | None
    ) -> _Layer:
        kept = [before.held(layer, expert) if before is not None else None for expert in experts]
        held = {one: found for one, found in zip(experts, kept, strict=True) if found is not None}
        missing = [(layer, expert) for expert in dict.fromkeys(experts) if expert not in held]
        if missing and fetch is not None:
            held |= self._copied(missing, fetch)
            missing = [key for key in missing if key[1] not in held]
        if missing:
            names = [name for key in missing for name in self._names(key)]
            weights = self._checkpoint.load(names, progress=False)
            for key in missing:
                held[key[1]] = self._pack(key, weights, _digest(self._bytes(key, weights)))
            self.taken["read"] += len(missing)
            self.taken["read_bytes"] += sum(map(self._size, missing))
        self._digests |= {(layer, expert): one.digest for expert, one in held.items()}
        return _Layer(
            tuple(experts),
            self._ops.join_experts([held[expert].packed for expert in experts]),
            {expert: one.digest for expert, one in held.items()},
        )

    def copy(self, layer: int, expert: int) -> ExpertCopy:
        """An expert for another process. KeyError if it has never been loaded here, OSError if it
        cannot be read.

        The bytes are read again, for in memory they are packed; the digest is that of loading.
        """
        digest, parts = self._digests[layer, expert], []
        for name in self._names((layer, expert)):
            entry = self._checkpoint.stored[name]
            with (self._checkpoint.path / entry.file).open("rb") as file:
                file.seek(entry.begin)
                parts.append(file.read(entry.end - entry.begin))
        return ExpertCopy(b"".join(parts), digest)

    def _copied(self, keys: Sequence[Key], fetch: Fetch) -> dict[int, _Held]:
        """Those of a layer's experts that come whole from others."""
        held = {}
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="copy") as pool:
            for key, copy in zip(keys, pool.map(lambda key: fetch(*key), keys), strict=True):
                if copy is None:
                    continue
                if len(copy.data) == self._size(key) and _digest([copy.data]) == copy.digest:
                    held[key[1]] = self._pack(key, self._unpacked(key, copy), copy.digest)
                    self.taken["copied"] += 1
                    self.taken["copied_bytes"] += len(copy.data)
                    continue
                self.taken["refused"] += 1
                log.error(
                    "expert %d of layer %d: a copy of %d bytes does not match its digest; "
                    "loading it from %s", key[1], key[0], len(copy.data), self._checkpoint.path,
                )  # fmt: skip
        return held

    def _unpacked(self, key: Key, copy: ExpertCopy) -> Weights:
        flat, at, tensors = torch.frombuffer(bytearray(copy.data), dtype=torch.uint8), 0, {}
        for name in self._names(key):
            entry = self._checkpoint.stored[name]
            piece = flat[at : at + entry.end - entry.begin].clone()  # aligned for its dtype
            tensors[name] = piece.view(DTYPES[entry.dtype]).view(entry.shape)
            at += entry.end - entry.begin
        return Weights(tensors)

    def _size(self, key: Key) -> int:
        stored = [self._checkpoint.stored[name] for name in self._names(key)]
        return sum(entry.end - entry.begin for entry in stored)

    def _names(self, key: Key) -> list[str]:
        """The tensors of an expert, in the order of a copy."""
        prefix = f"model.layers.{key[0]}.mlp.experts.{key[1]}"
        names = [f"{prefix}.{part}_proj.weight" for part in ("gate", "up", "down")]
        scales = [name + SCALE_SUFFIX for name in names]
        return names + [name for name in scales if name in self._checkpoint.stored]

    def _bytes(self, key: Key, weights: Weights) -> list[memoryview]:
        views = (weights.tensor(name).flatten().view(torch.uint8) for name in self._names(key))
        return [view.numpy().data for view in views]

    def _pack(self, key: Key, weights: Weights, digest: bytes) -> _Held:
        gate, up, down = (weights.weight(name) for name in self._names(key)[:3])
        return _Held(self._ops.pack_experts([[gate, up]], [down]), digest)


def _digest(parts: Sequence[bytes | memoryview]) -> bytes:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        digest.update(part)
    return digest.digest()
