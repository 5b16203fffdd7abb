"""`rayseek train`: start the workers of a run on this machine."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch.multiprocessing as processes

from rayseek.model.training.exchange import Alone, join
from rayseek.model.training.loop import train
from rayseek.model.training.run_config import RunConfig


def run(config: RunConfig, folder: Path) -> None:
    """Train in this process, or in config.workers new ones."""
    if config.workers == 1:
        train(config, folder, Alone())
        return
    meeting = os.path.join(tempfile.mkdtemp(prefix="rayseek-train-"), "meeting")
    processes.spawn(_worker, (config, folder, meeting), nprocs=config.workers)


def _worker(rank: int, config: RunConfig, folder: Path, meeting: str) -> None:
    train(config, folder, join(rank, config.workers, meeting))
