"""Evaluation on held-out documents: loss, drafts, balance."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rayseek.model.training.corpus import shard_paths
from rayseek.model.training.packing import PackedBatch
from rayseek.model.training.parameters import TrainedModel
from rayseek.model.training.run_config import Data
from rayseek.model.training.step import max_violation, states
from rayseek.model.training.stream import BatchStream, Position


def evaluate_batches(
    model: TrainedModel, data: Data, batch_tokens: int, batches: int
) -> dict[str, Any]:
    """Means over the answers (weight 1) in the first batches of the held-out corpus.

    acceptance: of the drafts that follow an answer's token, how many equal the main model's own
    greedy token there (given the true text before).
    """
    assert data.held_out is not None
    shards = len(shard_paths(data.held_out))
    stream = BatchStream(
        data.held_out, shards, batch_tokens, data.row_tokens, 0, Position(), thinned=False
    )
    totals = torch.zeros(6, dtype=torch.float64)
    count_LE: Tensor | None = None
    for _ in range(batches):
        batch = stream.take()
        totals += _totals(model, batch)
        counts = torch.stack(model.ops.loads.count_E)
        count_LE = counts if count_LE is None else count_LE + counts
    assert count_LE is not None
    loss, weight, right, drafts, accepted, mtp_loss = totals.tolist()
    return {
        "held_out_loss": loss / weight,
        "held_out_perplexity": math.exp(loss / weight),
        "held_out_accuracy": right / weight,
        "held_out_mtp_loss": mtp_loss / max(drafts, 1),
        "acceptance": accepted / max(drafts, 1),
        "held_out_max_violation": max_violation(count_LE.double()),
        "dead_experts": int((count_LE == 0).sum()),
    }


def _totals(model: TrainedModel, batch: PackedBatch) -> Tensor:
    # With gradients, though none are wanted: the layers are compiled for that already.
    main_TD, mtp_TD = (state.detach() for state in states(model, batch))
    whole = (batch.next_weight == 1, batch.after_weight == 1)
    weight_T, after_weight_T, target_T, after_T = (
        torch.from_numpy(array).to(model.device)
        for array in (*whole, batch.next_ids, batch.after_ids)
    )
    row_R = weight_T.nonzero().flatten()
    logits = (main_TD[row_R] @ model.main.head.detach().T).float()
    losses = torch.nn.functional.cross_entropy(logits, target_T[row_R], reduction="none")
    greedy_T = torch.full_like(target_T, -1)
    greedy_T[row_R] = logits.argmax(-1)
    right = (logits.argmax(-1) == target_T[row_R]).sum()
    draft_R = after_weight_T.nonzero().flatten()
    draft_logits = (mtp_TD[draft_R] @ model.main.head.detach().T).float()
    mtp_losses = torch.nn.functional.cross_entropy(draft_logits, after_T[draft_R], reduction="sum")
    accepted = (draft_logits.argmax(-1) == greedy_T[draft_R + 1]).sum()
    found = (losses.sum(), len(row_R), right, len(draft_R), accepted, mtp_losses)
    return torch.tensor([float(part) for part in found], dtype=torch.float64)
