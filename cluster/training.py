"""Training on a Ray cluster: the loop of model/training as Ray Train's function.

Ray starts the workers and joins them into one process group; gradients and expert counts are then
summed by the same `Exchange` as on one machine. Corpus, tokenizer and run folder must lie where
every node sees them. A worker that dies ends all; Ray starts them again from the saved state.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rayseek.model.training.run_config import RunConfig

RESTARTS = 3  # after which a run that fails again is given up


def train_on_ray(config: RunConfig, folder: Path) -> None:
    """Train with config.workers processes of the cluster at hand, or of a new one on this machine.

    Raises ValueError if Ray Train is not installed, or what Ray Train raises if the run fails.
    """
    try:
        from ray.train import FailureConfig, ScalingConfig
        from ray.train import RunConfig as RayRunConfig
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError as error:
        message = f"--ray-workers needs Ray Train: pip install 'rayseek[train]' ({error})"
        raise ValueError(message) from None

    cuda = config.device == "cuda"
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"config": _absolute(config), "folder": str(folder.absolute())},
        scaling_config=ScalingConfig(
            num_workers=config.workers,
            use_gpu=cuda,
            resources_per_worker={"CPU": config.threads, "GPU": cuda},
        ),
        torch_config=TorchConfig(backend="nccl" if cuda else "gloo"),
        run_config=RayRunConfig(
            name="ray",
            storage_path=str(folder.absolute()),
            failure_config=FailureConfig(max_failures=RESTARTS),
        ),
    )
    trainer.fit()


def _absolute(config: RunConfig) -> dict[str, Any]:
    """The config with paths that mean the same in any process."""
    data = config.model_dump(mode="json")
    for name in ("corpus", "held_out", "tokenizer"):
        if data["data"][name] is not None:
            data["data"][name] = str(Path(data["data"][name]).absolute())
    if data["model"] is not None:
        data["model"] = str(Path(data["model"]).absolute())
    return data


def _worker(given: dict[str, Any]) -> None:
    """One worker, in whose process Ray has joined the group."""
    from rayseek.model.training.exchange import Group
    from rayseek.model.training.loop import train

    train(RunConfig.model_validate(given["config"]), Path(given["folder"]), Group())
