"""The training loop: steps, schedule, metrics, evaluation, state. One call is one worker.

Every worker holds the whole model and takes its share of a step's batches; gradients and expert
counts are summed by `Exchange`. A run folder has `run.yaml`, `metrics.jsonl` and the state.
"""

from __future__ import annotations

import ctypes
import json
import signal
import time
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
from rayseek.model.training.run_config import RunConfig, Schedule
from rayseek.model.training.run_state import load_state, save_state
from rayseek.model.training.step import Sums, add_gradients, max_violation, update_biases
from rayseek.model.training.stream import BatchStream, Position

torch._dynamo.config.recompile_limit = 64  # row lengths, with and without gradients, layers

METRICS = "metrics.jsonl"
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
    model = TrainedModel(shape, initial_tensors(shape, config.seed), torch.bfloat16, positions)
    for block in (*model.main.blocks, model.mtp.block):
        block.attend = torch.compile(block.attend, dynamic=False)
        block.feed_forward = torch.compile(block.feed_forward, dynamic=False)
    optimiser = Optimiser(model, shape, config.schedule.weight_decay, torch.bfloat16)
    return model, optimiser


def train(config: RunConfig, folder: Path, exchange: Exchange, show: bool = True) -> None:
    """Train, or go on from the folder's state, to config.schedule.steps.

    Stops after the step in hand on SIGINT or SIGTERM, with the state saved.
    """
    _keep_memory()
    torch.set_num_threads(config.threads)
    schedule = config.schedule
    model, optimiser = build(config)
    step, position = load_state(folder, model, optimiser) or (0, Position())
    first = exchange.rank == 0
    stream = BatchStream(
        config.data.corpus, config.data.shards, schedule.batch_tokens, config.data.row_tokens,
        config.seed, position,
    )  # fmt: skip
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")), "utf-8")
    stopping: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _: stopping.append(n))
    layers, experts = len(model.bias), model.config.n_routed_experts
    recent = Sums.zeros(layers, experts)
    began = saved = time.monotonic()
    norms: list[float] = []
    stop = torch.zeros(1)
    while step < schedule.steps and not stop.any():
        decaying = step >= schedule.steps * (1 - schedule.decay_share)
        sums = Sums.zeros(layers, experts)
        for _ in range(schedule.batches // exchange.workers):
            add_gradients(
                model, stream.take(exchange.rank, exchange.workers),
                config.balance.mtp_weight[decaying], config.balance.sequence_loss, sums,
            )  # fmt: skip
        exchange.add(model.gradient)
        exchange.add(sums.values)
        exchange.add(sums.count_LE)
        norm = float(model.gradient.norm() / sums.values[1])
        scale = min(1.0, schedule.clip / (norm + 1e-6)) / float(sums.values[1])
        factor = rate(step, schedule)
        step += 1
        optimiser.step(step, schedule.muon_rate * factor, schedule.adam_rate * factor, scale)
        if step <= schedule.steps * (1 - STILL_SHARE):
            update_biases(model, sums.count_LE, config.balance.bias_step[decaying])
        recent.values += sums.values
        recent.count_LE += sums.count_LE
        norms.append(norm)
        if step % config.log_steps == 0 and first:
            seconds = time.monotonic() - began
            positions = config.log_steps * schedule.batches * schedule.batch_tokens
            record = {"step": step, "shard": stream.position.shard, "rate": factor}
            record |= _means(recent) | {
                "norm": sum(norms) / len(norms), "positions_per_s": positions / seconds,
            }  # fmt: skip
            _record(folder, record, schedule.steps, show)
        if step % config.log_steps == 0:
            recent, norms, began = Sums.zeros(layers, experts), [], time.monotonic()
        stop[0] = len(stopping)
        exchange.add(stop)
        ended = step == schedule.steps or bool(stop.any())
        if first and (ended or time.monotonic() - saved > 60 * config.save_minutes):
            save_state(folder, step, stream.position, model, optimiser)
            saved = time.monotonic()
        if config.data.held_out and first and (ended or step % config.eval_steps == 0):
            found = evaluate_batches(model, config.data, schedule.batch_tokens, config.eval_batches)
            _record(folder, {"step": step} | found, schedule.steps, show)


def _means(sums: Sums) -> dict[str, Any]:
    loss, weight, right, mtp_loss, mtp_weight, mtp_right = sums.values.tolist()
    return {
        "loss": loss / weight, "mtp_loss": mtp_loss / mtp_weight, "accuracy": right / weight,
        "mtp_accuracy": mtp_right / mtp_weight, "max_violation": max_violation(sums.count_LE),
    }  # fmt: skip


def _record(folder: Path, record: dict[str, Any], steps: int, show: bool) -> None:
    with (folder / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    if show:
        parts = []
        for key, value in record.items():
            values = value if isinstance(value, list) else [value]
            shown = " ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in values)
            parts.append(f"{key} {shown}")
        print(f"[{steps}] " + ", ".join(parts), flush=True)


def _keep_memory() -> None:
    """Ask glibc to keep freed memory: fetching it from the kernel again costs 5-15 % of a step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            mallopt(option, 1 << 30)
