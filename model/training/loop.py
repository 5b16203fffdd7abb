"""The training loop: steps, schedule, metrics, evaluation, state. One call is one worker.

Every worker holds the whole model and takes its share of a step's batches; gradients and expert
counts are summed by `Exchange`. A run folder has `run.yaml`, `metrics.jsonl` and the state.
"""

from __future__ import annotations

import ctypes
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml

from rayseek.model.config import ModelConfig
from rayseek.model.maker import SMALL
from rayseek.model.training.evaluate import evaluate_batches
from rayseek.model.training.exchange import Exchange
from rayseek.model.training.optimiser import Optimiser
from rayseek.model.training.parameters import TrainedModel, initial_tensors
from rayseek.model.training.plots import plot_run
from rayseek.model.training.report import Report
from rayseek.model.training.run_config import RunConfig, Schedule
from rayseek.model.training.run_state import load_state, save_state
from rayseek.model.training.step import Sums, add_gradients, max_violation, update_biases
from rayseek.model.training.stream import BatchStream, Position

torch._dynamo.config.recompile_limit = 64  # row lengths, with and without gradients, layers

STILL_SHARE = 0.02  # of the steps, at the end, in which biases stay as they are


def rate(step: int, schedule: Schedule) -> float:
    """Factor of all learning rates at this step, counted from 0."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    left = schedule.steps - step
    return min(1.0, left / (schedule.steps * schedule.decay_share))


def build(config: RunConfig) -> tuple[TrainedModel, Optimiser]:
    """A fresh model and its optimiser."""
    shape = SMALL if config.model is None else ModelConfig.from_pretrained(config.model)
    positions = max(config.data.row_tokens)
    tensors = initial_tensors(shape, config.seed, torch.device(config.device))
    model = TrainedModel(shape, tensors, torch.bfloat16, positions)
    for block in (*model.main.blocks, model.mtp.block):
        block.attend = torch.compile(block.attend, dynamic=False)  # type: ignore[assignment]
        block.feed_forward = torch.compile(block.feed_forward, dynamic=False)  # type: ignore[assignment]
    optimiser = Optimiser(model, shape, config.schedule.weight_decay, torch.bfloat16)
    return model, optimiser


class Run:
    """A run as it stands: model and optimiser, the next batch, how many steps are done."""

    def __init__(self, config: RunConfig, folder: Path, exchange: Exchange) -> None:
        """A fresh run, or the folder's state."""
        self.config, self.folder, self.exchange = config, folder, exchange
        self.model, self.optimiser = build(config)
        found = load_state(folder, self.model, self.optimiser)
        self.step, position = found or (0, Position())
        self.stream = BatchStream(
            config.data.corpus, config.data.shards, config.schedule.batch_tokens,
            config.data.row_tokens, config.seed, position,
        )  # fmt: skip

    def sums(self) -> Sums:
        """Totals of nothing yet."""
        return Sums.zeros(len(self.model.bias), self.model.config.n_routed_experts)

    def advance(self) -> tuple[Sums, float]:
        """One step; its totals over all workers, and the norm of the gradient."""
        schedule, balance, model = self.config.schedule, self.config.balance, self.model
        decaying = self.step >= schedule.steps * (1 - schedule.decay_share)
        sums = self.sums()
        for _ in range(schedule.batches // self.exchange.workers):
            batch = self.stream.take(self.exchange.rank, self.exchange.workers)
            mtp_weight = balance.mtp_weight[decaying]
            add_gradients(
                model, batch, mtp_weight, balance.sequence_loss, sums, balance.mtp_recycled
            )
        for tensor in (model.gradient, sums.values, sums.count_LE):
            self.exchange.add(tensor)
        weight = float(sums.values[1])
        norm = float(model.gradient.norm()) / weight
        scale = min(1.0, schedule.clip / (norm + 1e-6)) / weight
        factor = rate(self.step, schedule)
        self.step += 1
        self.optimiser.step(
            self.step, schedule.muon_rate * factor, schedule.adam_rate * factor, scale
        )
        if self.step <= schedule.steps * (1 - STILL_SHARE):
            update_biases(model, sums.count_LE, balance.bias_step[decaying])
        return sums, norm

    def save(self) -> None:
        """Replace the folder's state."""
        save_state(self.folder, self.step, self.stream.position, self.model, self.optimiser)

    def evaluate(self) -> dict[str, Any]:
        """What the held-out documents say."""
        config = self.config
        return {"step": self.step} | evaluate_batches(
            self.model, config.data, config.schedule.batch_tokens, config.eval_batches
        )


def train(config: RunConfig, folder: Path, exchange: Exchange, show: bool = True) -> None:
    """Train, or go on from the folder's state, to config.schedule.steps.

    Stops after the step in hand when any worker gets SIGINT or SIGTERM, with the state saved.
    """
    _keep_memory()
    torch.set_num_threads(config.threads)
    schedule, first = config.schedule, exchange.rank == 0
    stance = "default" if config.compiled else "force_eager"
    with torch.compiler.set_stance(stance), _stopping() as stopping:
        run = Run(config, folder, exchange)
        tokens = schedule.batches * schedule.batch_tokens
        report = Report(folder, schedule.steps, run.step, tokens, show) if first else None
        if first:
            folder.mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump(config.model_dump(mode="json"))
            (folder / "run.yaml").write_text(text, "utf-8")
        with report or nullcontext():
            _steps(run, report, stopping)
        if first and show:
            try:
                plot_run(folder, folder / "plots.svg")
            except ValueError as why:
                print(why)


def _steps(run: Run, report: Report | None, stopping: list[int]) -> None:
    config, schedule = run.config, run.config.schedule
    recent, norms = run.sums(), list[float]()
    began = saved = time.monotonic()
    stop = torch.zeros(1)
    while run.step < schedule.steps and not stop.any():
        sums, norm = run.advance()
        recent.add(sums)
        norms.append(norm)
        stop[0] = len(stopping)
        run.exchange.add(stop)
        if report is not None:
            report.stepped()
        if run.step % config.log_steps == 0:
            seconds = time.monotonic() - began
            if report is not None:
                record: dict[str, Any] = {"step": run.step, "shard": run.stream.position.shard}
                record |= {"rate": rate(run.step - 1, schedule)} | means(recent)
                record["norm"] = sum(norms) / len(norms)
                record["positions_per_s"] = len(norms) * report.tokens / seconds
                report.record(record)
            recent, norms, began = run.sums(), [], time.monotonic()
        ended = run.step == schedule.steps or bool(stop.any())
        if report is None:
            continue
        if ended or time.monotonic() - saved > 60 * config.save_minutes:
            run.save()
            saved = time.monotonic()
        if config.data.held_out and (ended or run.step % config.eval_steps == 0):
            report.record(run.evaluate())


def means(sums: Sums) -> dict[str, Any]:
    """Losses and hits per weighted token; per MoE layer, the MTP module's last, its MaxVio."""
    loss, weight, right, mtp_loss, mtp_weight, mtp_right = sums.values.tolist()
    return {
        "loss": loss / weight, "mtp_loss": mtp_loss / mtp_weight, "accuracy": right / weight,
        "mtp_accuracy": mtp_right / mtp_weight, "max_violation": max_violation(sums.count_LE),
    }  # fmt: skip


@contextmanager
def _stopping() -> Iterator[list[int]]:
    """A list that a SIGINT or SIGTERM lengthens, where this thread may listen to signals."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {
        number: signal.signal(number, lambda n, _: asked.append(n))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _keep_memory() -> None:
    """Ask glibc to keep freed memory: fetching it from the kernel again costs 5-15 % of a step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            mallopt(option, 1 << 30)
