"""What a run must remember to go on exactly: written often, replaced whole."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rayseek.model.training.optimiser import Optimiser
from rayseek.model.training.parameters import TrainedModel
from rayseek.model.training.stream import Position

STATE = "state.safetensors"


def save_state(
    folder: Path, step: int, position: Position, model: TrainedModel, optimiser: Optimiser
) -> None:
    """Replace the folder's state; a crash leaves the old or the new one."""
    tensors = {"master": model.master, "first": optimiser.first, "second": optimiser.second}
    tensors |= {f"bias.{i}": bias for i, bias in enumerate(model.bias.values())}
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
    if tensors["master"].shape != model.master.shape:
        raise ValueError(f"{path}: of a model with {len(tensors['master']):,} parameters")
    model.master.copy_(tensors["master"])
    optimiser.first.copy_(tensors["first"])
    optimiser.second.copy_(tensors["second"])
    for i, bias in enumerate(model.bias.values()):
        bias.copy_(tensors[f"bias.{i}"])
    model.refresh()
    return about["step"], Position(about["shard"], about["batch"])
