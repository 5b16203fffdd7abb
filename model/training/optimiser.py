"""Muon for the matrices inside the network, AdamW for embedding, head, norms and router.

Muon steps along the orthogonalised momentum (five Newton-Schulz iterations, batched over all
matrices of one shape); every projection that shares a leaf with others is a matrix of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayseek.model.config import ModelConfig
from rayseek.model.inventory import inventory
from rayseek.model.training.parameters import Parameter, TrainedModel

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices_BMN: Tensor, dtype: torch.dtype) -> Tensor:
    """Singular values of each [M, N] brought near 1, M <= N; float32."""
    a, b, c = NEWTON_SCHULZ
    x = matrices_BMN.to(dtype)
    x = x / (x.float().square().sum((1, 2), keepdim=True).sqrt() + 1e-7).to(dtype)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.float()


class Optimiser:
    """Both rules over the parameters of a model; all state in flat tensors."""

    def __init__(
        self, model: TrainedModel, config: ModelConfig, weight_decay: float, dtype: torch.dtype
    ) -> None:
        self.model, self.weight_decay, self.dtype = model, weight_decay, dtype
        self.first = torch.zeros_like(model.master)
        self.second = torch.zeros_like(model.master)
        specs = inventory(config)
        self.by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor, Tensor, bool]]] = {}
        self.adam: list[tuple[Parameter, slice]] = []
        at = 0
        for p in model.parameters:
            n = p.master.numel()
            here = slice(at, at + n)
            at += n
            if not _muon(p):
                self.adam.append((p, here))
                continue
            flat = p.master.flatten(), p.gradient.flatten(), self.first[here]
            sizes = [specs[name].elements for name in p.names]
            for name, w, g, m in zip(p.names, *(x.split(sizes) for x in flat), strict=True):
                rows, columns = specs[name].shape
                views = [x.view(rows, columns) for x in (w, g, m)]
                tall = rows > columns
                shape = (columns, rows) if tall else (rows, columns)
                self.by_shape.setdefault(shape, []).append((*views, tall))

    @torch.no_grad()
    def step(self, number: int, muon_rate: float, adam_rate: float, scale: float) -> None:
        """One update from model.gradient * scale, which is cleared; `number` counts from 1."""
        self.model.gradient.mul_(scale)
        for shape, entries in self.by_shape.items():
            momenta = []
            for _, g, m, tall in entries:
                m.lerp_(g, 0.05)
                ahead = torch.lerp(g, m, 0.95)
                momenta.append(ahead.T if tall else ahead)
            updates = orthogonalise(torch.stack(momenta), self.dtype)
            stretch = (shape[1] / shape[0]) ** 0.5
            for (w, _, _, tall), update in zip(entries, updates, strict=True):
                w.mul_(1 - muon_rate * self.weight_decay)
                w.add_(update.T if tall else update, alpha=-muon_rate * (stretch if tall else 1.0))
        for p, here in self.adam:
            m, v, g = self.first[here], self.second[here], p.gradient.flatten()
            m.lerp_(g, 0.1)
            v.mul_(0.95).addcmul_(g, g, value=0.05)
            root = v.div(1 - 0.95**number).sqrt_().add_(1e-8)
            flat = p.master.view(-1)
            if p.names[0] == "lm_head.weight":
                flat.mul_(1 - adam_rate * self.weight_decay)
            flat.addcdiv_(m, root, value=-adam_rate / (1 - 0.9**number))
        self.model.gradient.zero_()
        self.model.refresh()


def _muon(p: Parameter) -> bool:
    return p.matrix and not p.names[0].endswith("mlp.gate.weight")
