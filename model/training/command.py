"""`rayseek train`: start the workers of a run on this machine, draw it, write its checkpoints."""

from __future__ import annotations

import os
import signal
import tempfile
from contextlib import suppress
from pathlib import Path

from torch.multiprocessing.spawn import ProcessExitedException, spawn

from rayseek.model.training.exchange import Alone, join
from rayseek.model.training.export import export
from rayseek.model.training.loop import build, train
from rayseek.model.training.run_config import RunConfig, load_run_config
from rayseek.model.training.run_state import load_state


def load(path: Path, steps: int | None, workers: int | None) -> RunConfig:
    """The config of a file with the command line's words on top."""
    data = load_run_config(path).model_dump()
    if steps is not None:
        data["schedule"]["steps"] = steps
    if workers is not None:
        data["workers"] = workers
    return RunConfig.model_validate(data)


def run(config: RunConfig, folder: Path) -> None:
    """Train in this process, or in config.workers new ones, until done or told to stop."""
    if config.workers == 1:
        train(config, folder, Alone())
        return
    with tempfile.TemporaryDirectory(prefix="rayseek-train-") as meeting:
        where = os.path.join(meeting, "file")
        workers = spawn(_worker, (config, folder, where), nprocs=config.workers, join=False)
        assert workers is not None

        asked: list[int] = []

        def pass_on(number: int, _: object) -> None:
            asked.append(number)
            for pid in workers.pids():
                with suppress(ProcessLookupError):  # it is done
                    os.kill(pid, number)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, pass_on)
        try:
            while not workers.join():
                pass
        except ProcessExitedException:  # a worker that had not begun yet and did not listen
            if not asked:
                raise


def _worker(rank: int, config: RunConfig, folder: Path, meeting: str) -> None:
    train(config, folder, join(rank, config.workers, meeting))


def plot(folder: Path, others: list[Path]) -> Path:
    """Draw a run, or the balance of several; the picture's path. Raises as `plots` does."""
    from rayseek.model.training.plots import plot_balance, plot_run

    path = folder / ("balance.svg" if others else "plots.svg")
    if others:
        plot_balance([folder, *others], path)
    else:
        plot_run(folder, path)
    return path


def export_run(config: RunConfig, folder: Path, target: Path) -> None:
    """Write target-bf16 and target-fp8 from the state in a run folder.

    Raises FileNotFoundError if it has none, FileExistsError if a target is there.
    """
    model, optimiser = build(config)
    if load_state(folder, model, optimiser) is None:
        raise FileNotFoundError(f"{folder} has no state to export; train first")
    for kind in ("bf16", "fp8"):
        path = target.with_name(f"{target.name}-{kind}")
        export(model, config.data.tokenizer, path, kind == "fp8")
