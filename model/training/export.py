"""From a run's state to checkpoints in the official layout, as the server loads them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from rayseek.model.inventory import TensorSpec
from rayseek.model.maker import write_checkpoint
from rayseek.model.training.parameters import TrainedModel


def export(model: TrainedModel, tokenizer: Path, path: Path, fp8: bool) -> None:
    """Write the model's masters as BF16, or as block FP8, with the tokenizer of a folder.

    Raises FileExistsError if something is at `path` already.
    """
    tensors = model.tensors()

    def values(name: str, spec: TensorSpec) -> Tensor:
        return tensors[name].detach().clone()

    texts = [
        (tokenizer / f).read_text("utf-8") for f in ("tokenizer.json", "tokenizer_config.json")
    ]
    config = replace(model.config, fp8_blocks=fp8)
    write_checkpoint(path, config, values, (texts[0], texts[1]))
