"""A finished checkpoint on held-out documents, by the classes and kernels that serve it.

Perplexity of the answers, and how evenly the routers of every MoE layer, the MTP module's last,
spread all tokens. The BF16 and the FP8 checkpoint of a run must agree here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from rayseek.kernels.ops import Ops
from rayseek.kernels.select import Device
from rayseek.model.batch import PAGE_TOKENS, Batch
from rayseek.model.cached_model import CachedModel
from rayseek.model.checkpoint import Checkpoint
from rayseek.model.inventory import owned_names
from rayseek.model.mtp import MTPModule
from rayseek.model.training.corpus import FULL_WEIGHT, read_shard, shard_paths
from rayseek.model.training.step import max_violation
from rayseek.model.transformer import Transformer

BATCH_TOKENS = 1024  # rows of a pass; a longer document is a pass of its own


@dataclass(frozen=True, slots=True)
class Text:
    """A held-out document; answer[i]: whether token i was to be written, not given."""

    ids: list[int]
    answer: list[bool]

    @property
    def prompt(self) -> list[int]:
        """What stands before its last answer."""
        end = len(self.ids)
        while end and self.answer[end - 1]:
            end -= 1
        return self.ids[:end]


@dataclass(frozen=True, slots=True)
class Assessment:
    """perplexity: of `tokens` answer tokens. max_violation, dead_experts: by MoE layer."""

    perplexity: float
    tokens: int
    max_violation: list[float]
    dead_experts: int


class CountedRoutes:
    """An `Ops` that remembers what its routers chose; all else is the wrapped one's."""

    def __init__(self, ops: Ops) -> None:
        self.ops = ops
        self.count_E: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        if name == "whole_pass":  # it would choose without asking here
            raise AttributeError(name)
        return getattr(self.ops, name)

    def route(self, logits_TE: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        """As the wrapped one's."""
        expert_TK, weight_TK = self.ops.route(logits_TE, *rest)
        counts = torch.bincount(expert_TK.flatten().long(), minlength=logits_TE.shape[1])
        self.count_E.append(counts.cpu())
        return expert_TK, weight_TK


def read_texts(folder: Path) -> list[Text]:
    """The documents of a corpus. Raises FileNotFoundError if it has no shards."""
    paths = shard_paths(folder)
    if not paths:
        raise FileNotFoundError(f"{folder} has no shards; make them by rayseek make-corpus")
    texts = []
    for shard in map(read_shard, paths):
        for number in range(len(shard)):
            ids, weights = shard.document(number)
            texts.append(Text(ids.tolist(), (weights == FULL_WEIGHT).tolist()))
    return texts


def load_model(
    checkpoint: Path, ops: Ops, device: Device, pages: int, positions: int
) -> CachedModel:
    """A checkpoint as it is served, with its draft module, over so many pages."""
    opened = Checkpoint.open(checkpoint)
    config = opened.config
    weights = opened.load(owned_names(config), progress=False).on(device)
    main = Transformer(config, weights, ops, positions)
    return CachedModel(main, pages, MTPModule(config, weights, ops, main))


@torch.inference_mode()
def assess(checkpoint: Path, texts: Sequence[Text], ops: Ops, device: Device = "cpu") -> Assessment:
    """Read every text, predicting each of its tokens; all texts have two tokens or more."""
    groups = list(_grouped(texts))
    pages = max(sum(_pages(len(text.ids)) for text in group) for group in groups)
    longest = max(len(text.ids) for text in texts)
    counted = CountedRoutes(ops)
    model = load_model(checkpoint, cast(Ops, counted), device, pages, longest)
    loss, tokens = 0.0, 0
    count_LE: Tensor | None = None
    for group in groups:
        counted.count_E.clear()
        tables, first = [], 0
        for text in group:
            tables.append(list(range(first, first + _pages(len(text.ids)))))
            first += len(tables[-1])
        ids, starts = [text.ids for text in group], [0] * len(group)
        passed = model.forward(Batch.of_sequences(ids, starts, tables))
        inner = torch.cat([torch.arange(len(i)) < len(i) - 1 for i in ids]).to(device)
        target = torch.tensor([token for i in ids for token in i[1:]], device=device)
        wanted = torch.tensor([a for text in group for a in text.answer[1:]], device=device)
        logits = passed.logits_RV[inner][wanted]
        loss += float(torch.nn.functional.cross_entropy(logits, target[wanted], reduction="sum"))
        tokens += int(wanted.sum())
        assert passed.normed_TD is not None
        ahead = Batch.of_sequences([i[1:] for i in ids], starts, tables)
        model.draft(ahead, passed.normed_TD[inner])
        counts = torch.stack(counted.count_E).double()
        count_LE = counts if count_LE is None else count_LE + counts
    assert count_LE is not None
    dead = int((count_LE == 0).sum())
    return Assessment(math.exp(loss / max(tokens, 1)), tokens, max_violation(count_LE), dead)


def _pages(tokens: int) -> int:
    return -(-tokens // PAGE_TOKENS)


def _grouped(texts: Sequence[Text]) -> Iterator[list[Text]]:
    group: list[Text] = []
    rows = 0
    for text in texts:
        if group and rows + len(text.ids) > BATCH_TOKENS:
            yield group
            group, rows = [], 0
        group.append(text)
        rows += len(text.ids)
    yield group
