"""The config of a training run: one small YAML file, parsed once, frozen.

A field exists only if two runs would differ in it. Paths are relative to the working directory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Data(Section):
    """What is learned from."""

    corpus: Path  # folder of shards; later ones may be written while the run goes on
    shards: int = Field(ge=1)  # how many there will be; after the last one the first comes again
    held_out: Path | None = None  # folder of shards to evaluate on
    tokenizer: Path  # folder with tokenizer.json and tokenizer_config.json
    row_tokens: tuple[int, ...] = (128, 256, 512)  # a document lies in the shortest that fits


class Schedule(Section):
    """How much, how fast; every rate is constant between warm-up and a linear decay to 0."""

    steps: int = Field(ge=1)
    batches: int = Field(default=2, ge=1)  # a step, over all workers
    batch_tokens: int = Field(default=4096, ge=1)
    warmup_steps: int = Field(default=40, ge=0)
    decay_share: float = Field(default=0.25, gt=0, le=1)  # of all steps
    muon_rate: float = Field(default=0.02, gt=0)  # matrices
    adam_rate: float = Field(default=3e-3, gt=0)  # embedding, head, norms, router
    weight_decay: float = Field(default=0.1, ge=0)
    clip: float = Field(default=1.0, gt=0)  # largest norm of the gradient


class Balance(Section):
    """Load balancing (spec section 3) and the MTP loss (section 2.4): value, then in the decay."""

    # [0, 0] switches the rule off; with it, biases rest in the last 2 % of all steps
    bias_step: tuple[float, float] = (0.003, 0.001)
    sequence_loss: float = Field(default=1e-4, ge=0)
    mtp_weight: tuple[float, float] = (0.3, 0.1)
    # share of the MTP module's rows that learn to go on from its own state: deeper drafts
    mtp_recycled: float = Field(default=0.0, ge=0, le=1)


class RunConfig(Section):
    data: Data
    schedule: Schedule
    balance: Balance = Balance()
    model: Path | None = None  # a config.json; None: `SMALL` of maker.py
    seed: int = 0
    workers: int = Field(default=1, ge=1)  # processes that share each step's batches
    threads: int = Field(default=1, ge=1)  # of a worker
    device: Literal["cpu", "cuda"] = "cpu"
    compiled: bool = True  # layers by torch.compile: minutes at the start, faster steps
    log_steps: int = Field(default=20, ge=1)
    eval_steps: int = Field(default=500, ge=1)
    eval_batches: int = Field(default=8, ge=1)
    save_minutes: float = Field(default=3, gt=0)

    @model_validator(mode="after")
    def _divisible(self) -> RunConfig:
        if self.schedule.batches % self.workers:
            raise ValueError(
                f"schedule.batches is {self.schedule.batches}: "
                f"it must be a multiple of the {self.workers} workers"
            )
        for row in self.data.row_tokens:
            if self.schedule.batch_tokens % row:
                raise ValueError(f"batch_tokens must be a multiple of row_tokens; {row} is not")
        return self


def load_run_config(path: str | Path) -> RunConfig:
    """Raises ValueError (pydantic's) naming each wrong field, or OSError."""
    return RunConfig.model_validate(yaml.safe_load(Path(path).read_text("utf-8")) or {})
