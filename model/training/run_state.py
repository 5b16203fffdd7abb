"""What a run must remember to go on exactly: written often, replaced whole."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rayseek.model.training.optimiser import Optimiser
from rayseek.model.training.parameters import TrainedModel
from rayseek.model.training.stream import Position

STATE = "state.safetensors"


def save_state(
    folder: Path, step: int, position: Position, model: TrainedModel, optimiser: Optimiser
) -> None:
    """Replace the folder's state; a crash leaves the old or the new one."""
    tensors = {name: tensor.contiguous() for name, tensor in _named(model, optimiser).items()}
    about = {"step": step, "shard": position.shard, "batch": position.batch}
    draft = folder / f".{STATE}.{os.getpid()}.part"
    save_file(tensors, draft, metadata={"about": json.dumps(about)})
    draft.replace(folder / STATE)


def load_state(
    folder: Path, model: TrainedModel, optimiser: Optimiser
) -> tuple[int, Position] | None:
    """Put the folder's state into the model; steps done and the next batch. None: there is none.

    Raises ValueError if it belongs to a model of another shape.
    """
    path = folder / STATE
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
    tensors = load_file(path)
    own = _named(model, optimiser)
    if {n: t.shape for n, t in tensors.items()} != {n: t.shape for n, t in own.items()}:
        raise ValueError(f"{path} belongs to another model; use another folder")
    for name, tensor in own.items():
        tensor.copy_(tensors[name])
    model.refresh()
    return about["step"], Position(about["shard"], about["batch"])


def _named(model: TrainedModel, optimiser: Optimiser) -> dict[str, Tensor]:
    """Everything that training changes; by name, so that it may lie in memory in any order."""
    flat = {"master": model.master, "first": optimiser.first, "second": optimiser.second}
    named = {f"bias/{name}": bias for name, bias in model.bias.items()}
    for kind, tensor in flat.items():
        named |= {f"{kind}/{name}": part for name, part in model.named(tensor).items()}
    return named
