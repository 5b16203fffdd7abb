"""The trained tensors: float32 masters, the leaves that are computed with, and their gradients.

Built from the leaves that `TrainOps` packed while the model was constructed, plus the tensors the
model uses as they are. Masters and gradients each lie in one flat float32 tensor, so that
exchanging, scaling and clipping them is one operation.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rayseek.model.checkpoint import Weights
from rayseek.model.config import ModelConfig
from rayseek.model.inventory import Kind, inventory
from rayseek.model.mtp import MTPModule
from rayseek.model.training.train_ops import Leaf, Rows, TrainOps
from rayseek.model.transformer import Transformer

RESIDUAL = ("o_proj.weight", "down_proj.weight")  # what writes into the residual stream


def initial_tensors(config: ModelConfig, seed: int, device: torch.device) -> dict[str, Tensor]:
    """Float32 starting values by checkpoint name, without the MTP module's copies.

    Matrices keep the scale of their input; those that write into the residual stream start small.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, spec in inventory(config).items():
        if spec.kind == Kind.MTP_COPY:
            continue
        if spec.kind == Kind.NORM:
            tensors[name] = torch.ones(spec.shape)
        elif name.endswith("e_score_correction_bias"):
            tensors[name] = torch.zeros(spec.shape)
        else:
            std = 0.1 if spec.kind == Kind.EMBEDDING else 0.5 / math.sqrt(spec.shape[-1])
            std *= 0.2 if name.endswith(RESIDUAL) else 1.0
            tensors[name] = torch.randn(spec.shape, generator=generator) * std
    return {name: tensor.to(device) for name, tensor in tensors.items()}


class Parameter:
    """A leaf with its views of the flat master and gradient."""

    def __init__(self, leaf: Leaf, master: Tensor, gradient: Tensor) -> None:
        self.names, self.tensor = leaf.names, leaf.tensor
        self.master, self.gradient = master, gradient

    @property
    def matrix(self) -> bool:
        """Whether Muon updates it: a matrix inside the network, or a stack of them."""
        outside = ("lm_head.weight", "model.embed_tokens.weight")
        return self.tensor.ndim >= 2 and self.names[0] not in outside


class TrainedModel:
    """The serving model's classes on `TrainOps`, with everything that training changes."""

    def __init__(
        self, config: ModelConfig, tensors: dict[str, Tensor], dtype: torch.dtype, positions: int
    ) -> None:
        self.config = config
        direct = [n for n, s in inventory(config).items() if s.kind in (Kind.NORM, Kind.EMBEDDING)]
        for name in direct:
            tensors[name].requires_grad_()
        self.ops = TrainOps(tensors, dtype)
        weights = Weights(tensors)
        self.main = Transformer(config, weights, self.ops, positions)  # type: ignore[arg-type]
        self.mtp = MTPModule(config, weights, self.ops, self.main)  # type: ignore[arg-type]
        self.biases = [n for n in tensors if n.endswith("e_score_correction_bias")]
        self.bias = {name: tensors[name] for name in self.biases}
        leaves = self.ops.leaves + [Leaf([name], tensors[name]) for name in direct]
        total = sum(leaf.tensor.numel() for leaf in leaves)
        self.device = device = self.main.embed_VD.device
        self.master, self.gradient = (
            torch.empty(total, device=device),
            torch.zeros(total, device=device),
        )
        self.parameters: list[Parameter] = []
        at = 0
        for leaf in leaves:
            n, shape = leaf.tensor.numel(), leaf.tensor.shape
            master = self.master[at : at + n].view(shape)
            master.copy_(
                torch.cat([tensors[name].detach().flatten() for name in leaf.names]).view(shape)
            )
            if leaf.tensor.dtype == torch.float32:
                leaf.tensor.data = master
            parameter = Parameter(leaf, master, self.gradient[at : at + n].view(shape))
            leaf.tensor.register_post_accumulate_grad_hook(_collector(parameter.gradient))
            self.parameters.append(parameter)
            at += n

    def rows(self) -> list[Rows]:
        """What stands for the pages of the main layers and the MTP module's."""
        return [Rows() for _ in range(self.config.num_hidden_layers + 1)]

    def refresh(self) -> None:
        """Give the leaves the masters' values."""
        for p in self.parameters:
            if p.tensor.dtype != torch.float32:
                p.tensor.detach().copy_(p.master)

    def tensors(self) -> dict[str, Tensor]:
        """Views of the masters by checkpoint name, and the biases."""
        return self.named(self.master) | self.bias

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of a tensor that is laid out as `master`, by checkpoint name."""
        specs = inventory(self.config)
        found: dict[str, Tensor] = {}
        at = 0
        for name in (name for p in self.parameters for name in p.names):
            found[name] = flat[at : at + specs[name].elements].view(specs[name].shape)
            at += specs[name].elements
        return found


def _collector(gradient: Tensor) -> Callable[[Tensor], None]:
    def collect(leaf: Tensor) -> None:
        assert leaf.grad is not None
        gradient.add_(leaf.grad)
        leaf.grad = None

    return collect
