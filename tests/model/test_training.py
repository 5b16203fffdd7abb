"""Runs of the trainer: they learn, stop and go on exactly, share work, balance their experts."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rayseek.model.training import loop
from rayseek.model.training.command import export_run, load, run
from rayseek.model.training.corpus import FULL_WEIGHT, shard_path, write_shard
from rayseek.model.training.exchange import Alone
from rayseek.model.training.report import read_metrics
from rayseek.model.training.run_config import RunConfig
from rayseek.model.training.run_state import STATE
from tests.conftest import TINY

SHARDS = 3


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents that repeat a short word: easy to learn, and few of the ids occur."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = np.random.default_rng(0)
    for number in range(SHARDS):
        documents = []
        for _ in range(250):
            word = draw.integers(10, 40, draw.integers(1, 4)).tolist()
            ids = [0, *(word * 30)[: draw.integers(3, 60)]]
            documents.append((ids, [0] + [FULL_WEIGHT] * (len(ids) - 1)))
        write_shard(shard_path(folder, number), documents)
    return folder


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> RunConfig:
    shape = tmp_path / "config.json"
    shape.write_text(json.dumps(TINY.to_dict()))
    return RunConfig.model_validate({
        "data": {
            "corpus": corpus, "shards": SHARDS, "held_out": corpus, "tokenizer": corpus,
            "row_tokens": (32, 64),
        },
        "schedule": {"steps": 6, "batches": 2, "batch_tokens": 512, "warmup_steps": 3},
        "model": shape, "compiled": False, "log_steps": 2, "eval_batches": 2,
    })  # fmt: skip


def changed(config: RunConfig, **sections: object) -> RunConfig:
    """The config with fields of its sections replaced, given as `section={field: value}`."""
    data = config.model_dump()
    for name, value in sections.items():
        data[name] = data[name] | value if isinstance(value, dict) else value
    return RunConfig.model_validate(data)


def state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / STATE)


def test_a_run_learns_and_tells_how(config: RunConfig, tmp_path: Path) -> None:
    config = changed(config, schedule={"steps": 30})
    loop.train(config, tmp_path / "run", Alone(), show=False)
    records = read_metrics(tmp_path / "run")
    assert [r["step"] for r in records] == list(range(2, 31, 2))
    assert records[-1]["loss"] < 0.5 * records[0]["loss"]
    assert records[-1]["mtp_loss"] < 0.6 * records[0]["mtp_loss"]
    held_out = records[-1]["held_out_loss"]  # of the same documents, after the last step
    assert held_out == pytest.approx(records[-1]["loss"], rel=0.2)
    assert 0 < records[-1]["acceptance"] <= 1
    assert len(records[-1]["held_out_max_violation"]) == 2  # one MoE layer, and the MTP module


def test_a_stopped_run_goes_on_as_if_never_stopped(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped by SIGTERM in the middle of a step, which is still done."""
    loop.train(config, tmp_path / "whole", Alone(), show=False)
    calls, update = [], loop.update_biases

    def interrupted(*given: object) -> None:
        calls.append(given)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        update(*given)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(loop, "update_biases", interrupted)
        loop.train(config, tmp_path / "parts", Alone(), show=False)
    assert len(calls) == 3
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    loop.train(config, tmp_path / "parts", Alone(), show=False)
    whole, parts = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_run_may_end_earlier_than_planned(config: RunConfig, tmp_path: Path) -> None:
    """Fewer steps at a resume: rates decay to 0 at the new end."""
    config = changed(config, log_steps=1)
    loop.train(config, tmp_path / "run", Alone(), show=False)
    long = changed(config, schedule={"steps": 100})
    exchange = Alone()
    stopped = loop.Run(long, tmp_path / "run", exchange)  # at step 6 of 100
    assert (stopped.step, loop.rate(stopped.step, long.schedule)) == (6, 1.0)
    (tmp_path / "long.yaml").write_text(json.dumps(long.model_dump(mode="json")))
    short = load(tmp_path / "long.yaml", 9, None)
    assert short.schedule.steps == 9
    loop.train(short, tmp_path / "run", exchange, show=False)
    rates = [r["rate"] for r in read_metrics(tmp_path / "run")]
    assert len(rates) == 9 and 0 < rates[-1] < 0.5
    before = state(tmp_path / "run")
    loop.train(short, tmp_path / "run", exchange, show=False)  # nothing left to do
    after = state(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_two_workers_do_what_one_does(config: RunConfig, tmp_path: Path) -> None:
    """The same batches in the same steps; only the order of a sum differs."""
    config = changed(config, schedule={"steps": 2}, eval_batches=1)
    loop.train(config, tmp_path / "one", Alone(), show=False)
    run(changed(config, workers=2), tmp_path / "two")
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    first, second = (read_metrics(tmp_path / name)[-1] for name in ("one", "two"))
    assert second["loss"] == pytest.approx(first["loss"], rel=1e-3)
    assert second["max_violation"] == pytest.approx(first["max_violation"], abs=0.1)
    for name in one:
        if name.startswith("first/"):  # momentum: what the gradients were
            error = (one[name] - two[name]).norm() / one[name].norm().clamp(min=1e-12)
            assert error < 0.1, name


def test_the_bias_rule_balances(config: RunConfig, tmp_path: Path) -> None:
    """Without it and the balance loss, the busiest expert is further above the mean."""
    violation = {}
    for rule in (0.0, 0.01):
        balance = {"bias_step": (rule, rule), "sequence_loss": 0.0}
        schedule = {"steps": 40, "batches": 1}
        wanted = changed(config, balance=balance, schedule=schedule, log_steps=10)
        folder = tmp_path / str(rule)
        loop.train(wanted, folder, Alone(), show=False)
        violation[rule] = np.mean(read_metrics(folder)[-1]["max_violation"])
        biases = [t for name, t in state(folder).items() if name.startswith("bias/")]
        assert all(bool(bias.any()) == bool(rule) for bias in biases)
    assert violation[0.01] < 0.6 * violation[0.0]


def test_wrong_configs_and_folders_are_refused(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a multiple of the 3 workers"):
        changed(config, workers=3)
    with pytest.raises(ValueError, match="48 is not"):
        changed(config, data={"row_tokens": (48,)})
    with pytest.raises(FileNotFoundError, match="train first"):
        export_run(config, tmp_path / "nothing", tmp_path / "model")
    with pytest.raises(FileNotFoundError, match="train first"):
        read_metrics(tmp_path / "nothing")
