"""What a run tells: one JSON line a record in `metrics.jsonl`, and the terminal.

A terminal shows a bar with the speed and the time left; anything else gets one line a record.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

METRICS = "metrics.jsonl"


class Report:
    """Of one run, as a context; only the first worker has one.

    step: how many were done before. tokens: positions of a step.
    """

    def __init__(self, folder: Path, steps: int, step: int, tokens: int, show: bool) -> None:
        self.folder, self.steps, self.tokens, self.show = folder, steps, tokens, show
        self.bar: Progress | None = None
        if show and sys.stdout.isatty():
            self.bar = Progress(
                TextColumn("step"), MofNCompleteColumn(), BarColumn(None),
                TextColumn("{task.fields[said]}"), TimeElapsedColumn(), TextColumn("left"),
                TimeRemainingColumn(elapsed_when_finished=True),
            )  # fmt: skip
            self.task = self.bar.add_task("", total=steps, completed=step, said="compiling")

    def __enter__(self) -> Report:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def stepped(self) -> None:
        """One step is done."""
        if self.bar is not None:
            self.bar.advance(self.task)

    def record(self, record: dict[str, Any]) -> None:
        """Keep a record of numbers and lists of numbers, and show it."""
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self.bar is None:
            if self.show:
                print(f"[{self.steps}] {readable(record)}", flush=True)
        elif "positions_per_s" in record:
            said = f"{record['positions_per_s']:,.0f} tokens/s, loss {record['loss']:.3f}"
            self.bar.update(self.task, said=said)
        else:
            self.bar.console.print(readable(record))


def readable(record: dict[str, Any]) -> str:
    """`name value, name value value, ...`"""
    parts = []
    for key, value in record.items():
        values = value if isinstance(value, list) else [value]
        shown = " ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in values)
        parts.append(f"{key} {shown}")
    return ", ".join(parts)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """What is known of each step that has a record, in order; of one done twice, the later.

    Raises FileNotFoundError if the folder has no metrics.
    """
    path = folder / METRICS
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there; train first")
    known: dict[int, dict[str, Any]] = {}
    for line in path.read_text("utf-8").splitlines():
        record = json.loads(line)
        known.setdefault(record["step"], {}).update(record)
    return [known[step] for step in sorted(known)]
