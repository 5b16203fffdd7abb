"""Pictures of runs, drawn from their metrics. Needs matplotlib: the extra `train`.

`plot_run` is one run's losses, balance and drafts; `plot_balance` sets the balance of several
runs side by side.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rayseek.model.training.report import read_metrics

MISSING = "plots need matplotlib: pip install 'rayseek[train]'"
Records = list[dict[str, Any]]


def plot_run(folder: Path, path: Path) -> None:
    """Draw a run's metrics. Raises FileNotFoundError without any, ValueError without matplotlib."""
    records = read_metrics(folder)
    figure, ((loss, mtp), (balance, drafts)) = _figure(2, 2)
    for axes, kind in ((loss, ""), (mtp, "mtp_")):
        axes.set(title=f"{'MTP loss' if kind else 'Loss'} of a weighted token", yscale="log")
        for label, name in (("training", kind), ("held out, answers only", f"held_out_{kind}")):
            style = ".-" if "held" in name else "-"
            axes.plot(*_series(records, f"{name}loss"), style, label=label)
    _violations(balance, records, "Busiest expert above the mean load (MaxVio)")
    drafts.set(title="Drafts that are the main model's own choice, held out", ylim=(0, 1))
    drafts.plot(*_series(records, "acceptance"), ".-", label="acceptance")
    drafts.plot(
        *_series(records, "held_out_accuracy"), ".-", label="right tokens of the main model"
    )
    _finish(figure, path)


def plot_balance(folders: list[Path], path: Path) -> None:
    """Draw the MaxVio of several runs' training batches, each in a panel; all on one scale."""
    runs = [read_metrics(folder) for folder in folders]
    figure, (panels,) = _figure(1, len(folders))
    most = max(max(r["max_violation"]) for run in runs for r in run if "max_violation" in r)
    for axes, folder, run in zip(panels, folders, runs, strict=True):
        _violations(axes, run, folder.name)
        axes.set(ylim=(0, 1.05 * most), ylabel="MaxVio")
    _finish(figure, path)


def _figure(rows: int, columns: int) -> tuple[Any, Any]:
    try:
        from matplotlib import rcParams
    except ImportError:
        raise ValueError(MISSING) from None
    from matplotlib.figure import Figure

    rcParams |= {"svg.hashsalt": "rayseek", "axes.prop_cycle": _colours()}
    figure = Figure(figsize=(5.5 * columns, 3.6 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _colours() -> Any:
    from cycler import cycler

    return cycler(color=["#3b6fb6", "#d97a2b", "#3f9a6d", "#9b5aa5", "#7a7a7a", "#c44e52"])


def _series(records: Records, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of the records that have this value."""
    found = [r for r in records if name in r]
    return [r["step"] for r in found], [r[name] for r in found]


def _violations(axes: Any, records: Records, title: str) -> None:
    axes.set(title=title)
    steps, values = _series(records, "max_violation")
    lines: list[list[float]] = list(map(list, zip(*values, strict=True)))
    for number, line in enumerate(lines, start=1):
        last = number == len(lines)
        axes.plot(steps, line, label="MTP module" if last else f"MoE layer {number}", lw=1)


def _finish(figure: Any, path: Path) -> None:
    for axes in figure.axes:
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})
