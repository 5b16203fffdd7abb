"""One batch through the model: losses, gradients and what the routers did."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rayseek.model.batch import Batch
from rayseek.model.training.loss import HeadLoss
from rayseek.model.training.packing import PackedBatch
from rayseek.model.training.parameters import TrainedModel
from rayseek.model.training.train_ops import Loads, Rows


@dataclass(slots=True)
class Sums:
    """Totals over batches; divide by the weights for means."""

    values: Tensor  # float64: loss, weight, right, MTP loss, MTP weight, MTP right
    count_LE: Tensor  # float64 [MoE layers, E], the MTP module's last: tokens of each expert

    def add(self, other: Sums) -> None:
        """Take another's totals in."""
        self.values += other.values
        self.count_LE += other.count_LE

    @staticmethod
    def zeros(layers: int, experts: int) -> Sums:
        return Sums(torch.zeros(6, dtype=torch.float64), torch.zeros(layers, experts).double())


def states(model: TrainedModel, batch: PackedBatch, recycled: float = 0.0) -> tuple[Tensor, Tensor]:
    """Normed states [T, D] of the main model and of the MTP module, as the head takes them.

    recycled: share of the module's rows that are given its own state of the row before instead of
    the main model's state, as when it drafts further than one token ahead.
    """
    device = model.device
    position = torch.from_numpy(batch.position).int().to(device)
    model.ops.begin(batch.row_tokens, position)
    rows = model.rows()
    unused = torch.empty(0)
    first, second = (
        Batch(torch.from_numpy(ids).to(device), position, unused, unused, unused, unused)
        for ids in (batch.ids, batch.next_ids)
    )
    hidden_TD = model.main.hidden(first, rows[:-1])  # type: ignore[arg-type]
    hidden_TD = model.ops.rms_norm(hidden_TD, model.main.final_norm)
    given_TD = hidden_TD
    if recycled:
        counted, model.ops.loads = model.ops.loads, Loads()
        with torch.no_grad():
            own_TD = model.mtp.states(second, hidden_TD.detach(), Rows())  # type: ignore[arg-type]
        model.ops.loads = counted
        # Which rows is a function of the text, so that a run that goes on does as one that went on.
        mixed_T = (batch.next_ids * 40503 + batch.position * 31337) * 2654435761 >> 16
        chosen_T = torch.from_numpy((mixed_T % 1024 < recycled * 1024) & (batch.position > 0))
        given_TD = torch.where(chosen_T.to(device)[:, None], own_TD.roll(1, 0), hidden_TD)
    return hidden_TD, model.mtp.states(second, given_TD, rows[-1])  # type: ignore[arg-type]


def add_gradients(
    model: TrainedModel,
    batch: PackedBatch,
    mtp_weight: float,
    balance_weight: float,
    sums: Sums,
    recycled: float = 0.0,
) -> None:
    """Add the gradient of the batch's summed loss to model.gradient, and the rest to `sums`.

    recycled: see `states`.
    """
    main_TD, mtp_TD = states(model, batch, recycled)
    weights, targets = (
        [torch.from_numpy(array).to(model.device) for array in pair]
        for pair in ((batch.next_weight, batch.after_weight), (batch.next_ids, batch.after_ids))
    )
    results = [
        HeadLoss.apply(state, model.main.head, target, weight)  # type: ignore[no-untyped-call]
        for state, target, weight in zip((main_TD, mtp_TD), targets, weights, strict=True)
    ]
    balance = torch.stack(model.ops.loads.balance).sum()
    total = weights[0].sum()
    loss = results[0][0] + mtp_weight * results[1][0] + balance_weight * total * balance
    loss.backward()
    for i, ((part, right), weight) in enumerate(zip(results, weights, strict=True)):
        found = torch.stack([part.detach(), weight.sum(), (right * weight).sum()])
        sums.values[3 * i : 3 * i + 3] += found.cpu()
    sums.count_LE += torch.stack(model.ops.loads.count_E).cpu()


def update_biases(model: TrainedModel, count_LE: Tensor, step: float) -> None:
    """Lower the bias of experts above the mean load, raise that of those below (spec section 3)."""
    for bias_E, count_E in zip(model.bias.values(), count_LE, strict=True):
        bias_E += step * torch.sign(count_E.mean() - count_E).to(bias_E)


def max_violation(count_LE: Tensor) -> list[float]:
    """Per layer, how far the busiest expert is above the mean load."""
    return [float(c.max() / c.mean() - 1) for c in count_LE]
