"""What `rayseek doctor` says of machines: a sound one, and one with each thing wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayseek.cluster import machine
from rayseek.cluster.config import load_config
from rayseek.cluster.doctor import (
    CHECKS,
    FILES_OF_A_CLUSTER,
    GIB,
    Facts,
    Gpu,
    Needs,
    Port,
    RayCluster,
    RdmaPort,
    diagnose,
    needs_of,
)
from rayseek.model.maker import SMALL
from rayseek.model.official import DEEPSEEK_V3

H800 = Gpu("NVIDIA H800", 79 * GIB, 78 * GIB)
LAPTOP = Needs(rank_bytes=GIB, node_bytes=2 * GIB)
NODE = Needs(
    accelerator="H800", gpus=8, nodes=2, rank_bytes=70 * GIB, node_bytes=560 * GIB,
    fabric="roce", devices="mlx5", gid_index=3,
)  # fmt: skip
SOUND = Facts(
    installed="ray 2.60.0", ray="2.60.0", ray_cluster=RayCluster("10.0.0.1:6379", "2.60.0"),
    gpus=(H800,) * 8, driver="580.65", driver_cuda=(13, 0), cuda=(13, 0), nccl="2.27.7",
    rdma=tuple(RdmaPort(f"mlx5_{i}", "ACTIVE", frozenset({0, 3})) for i in range(8)),
    memlock=None, shm=64 * GIB, open_files=None, memory=64 * GIB, memory_free=60 * GIB,
    clock_error_s=0.01, kernels="C++", c_compiler="/usr/bin/cc", cache="/cache",
    ports=(Port("API", 8000),), model="/models/v3", keys="2 in keys.yaml",
)  # fmt: skip
SMALL_ONE = replace(H800, memory=40 * GIB)
TAKEN = replace(H800, free=20 * GIB)

# check, machine, what is different there, state, words of the line
WRONG: list[tuple[str, Needs, dict[str, Any], str, str]] = [
    ("packages", LAPTOP, {"requirements": ("torch needs triton==3.7.1, here is 3.5",)},
     "problem", "3.5"),
    ("GPUs", NODE, {"gpus": ()}, "problem", "8 x H800 are needed"),
    ("GPUs", NODE, {"gpus": (H800,) * 7}, "problem", "7 x NVIDIA H800"),
    ("GPUs", NODE, {"gpus": (Gpu("NVIDIA A100", 79 * GIB, 79 * GIB, (8, 0)),) * 8},
     "problem", "A100 is no H800"),
    ("driver", NODE, {"cuda": None}, "problem", "without CUDA"),
    ("driver", NODE, {"driver_cuda": None}, "problem", "no NVIDIA driver"),
    ("driver", NODE, {"driver_cuda": (12, 8)}, "problem", "knows CUDA 12.8, torch was built"),
    ("NCCL", NODE, {"nccl": ""}, "problem", "none"),
    ("RDMA", NODE, {"rdma": ()}, "problem", "none at all"),
    ("RDMA", NODE, {"rdma": (RdmaPort("mlx5_0", "DOWN", frozenset({3})),)}, "problem", "DOWN"),
    ("RDMA", NODE, {"rdma": (RdmaPort("bnxt_0", "ACTIVE", frozenset({3})),)}, "problem", "bnxt_0"),
    ("RDMA", NODE, {"rdma": (RdmaPort("mlx5_0", "ACTIVE", frozenset({0})),)}, "problem", "GID 3"),
    ("RDMA", NODE, {"rdma": (*SOUND.rdma, RdmaPort("mlx5_9", "DOWN"))}, "warning", "not mlx5_9"),
    ("memlock", NODE, {"memlock": 2**16}, "problem", "pins"),
    ("memory", NODE, {"gpus": (*(H800,) * 7, SMALL_ONE)}, "problem", "there are 40.0 GiB"),
    ("memory", NODE, {"gpus": (*(H800,) * 7, TAKEN)}, "problem", "20.0 GiB of 79.0 GiB are free"),
    ("memory", LAPTOP, {"memory": GIB, "memory_free": GIB}, "problem", "there are 1.0 GiB"),
    ("memory", LAPTOP, {"memory_free": GIB}, "problem", "1.0 GiB of 64.0 GiB are"),
    ("memory", replace(LAPTOP, misfits=("too much",)), {}, "problem", "too much"),
    ("/dev/shm", NODE, {"shm": 2**26}, "problem", "64 MiB, should be 8.0 GiB"),
    ("/dev/shm", LAPTOP, {"shm": 2**26}, "warning", "64 MiB"),
    ("open files", LAPTOP, {"open_files": 1024}, "problem", "1,024"),
    ("open files", NODE, {"open_files": FILES_OF_A_CLUSTER - 1}, "problem", "65,535"),
    ("clock", NODE, {"clock_error_s": None}, "problem", "not synchronised"),
    ("clock", NODE, {"clock_error_s": 3.0}, "problem", "wrong by 3.0 s"),
    ("clock", NODE, {"clock_known": False}, "warning", "does not tell"),
    ("kernels", LAPTOP, {"kernels": "plain PyTorch: no C++ compiler", "slow": True},
     "warning", "no C++"),
    ("kernels", replace(LAPTOP, kernels="native"), {"kernels": "no C++", "slow": True},
     "problem", "no C++"),
    ("compiler", NODE, {"c_compiler": ""}, "problem", "Triton"),
    ("cache", LAPTOP, {"cache_problem": "Read-only file system"}, "problem", "/cache: Read-only"),
    ("Ray", NODE, {"ray_cluster": None}, "warning", "no cluster"),
    ("Ray", NODE, {"ray_cluster": RayCluster("h:1", problem="mute")}, "problem", "h:1: mute"),
    ("Ray", NODE, {"ray_cluster": RayCluster("h:1", "2.59.0")}, "problem", "2.60.0 here, 2.59.0"),
    ("HAProxy", LAPTOP, {"proxy_problem": "no binary"}, "problem", "no binary"),
    ("ports", LAPTOP, {"ports": (Port("API", 8000, "rayseek"), Port("gRPC", 9000, "another"))},
     "problem", "another server has 9000 (gRPC)"),
    ("weights", LAPTOP, {"weights": tuple("abcde")}, "problem", "a; b; c, and 2 more"),
    ("tokenizer", LAPTOP, {"tokenizer": "no such file"}, "problem", "no such file"),
    ("keys", LAPTOP, {"keys_problem": "Permission denied"}, "problem", "Permission denied"),
]  # fmt: skip


@pytest.mark.parametrize(("check", "needs", "change", "state", "words"), WRONG)
def test_what_is_wrong_is_found_and_nothing_else(
    check: str, needs: Needs, change: dict[str, Any], state: str, words: str
) -> None:
    found = diagnose(needs, replace(SOUND, **change))
    (line,) = [finding for finding in found if finding.state != "ok"]
    assert (line.check, line.state) == (check, state)
    assert words in line.what and line.todo


def test_every_check_can_fail() -> None:
    names = {finding.check for needs in (LAPTOP, NODE) for finding in diagnose(needs, SOUND)}
    assert names == {check for check, *_ in WRONG}
    assert len(names) == len(CHECKS) + 1, "one check is of kernels, or of a compiler"


def test_only_what_applies_is_looked_at() -> None:
    def checks(needs: Needs) -> set[str]:
        found = diagnose(needs, SOUND)
        assert all(finding.state == "ok" and not finding.todo for finding in found)
        return {finding.check for finding in found}

    of_gpus = {"GPUs", "driver", "NCCL", "RDMA", "memlock", "compiler"}
    assert of_gpus <= checks(NODE)
    assert not of_gpus & checks(LAPTOP)
    assert checks(replace(NODE, fabric="none")) == checks(NODE) - {"RDMA", "memlock"}
    assert checks(replace(NODE, nodes=1)) == checks(NODE) - {"clock"}
    no_ranks = checks(replace(NODE, ranks=False))
    assert no_ranks == checks(NODE) - of_gpus - {"memory", "cache"}


def test_a_service_that_runs_is_not_in_its_own_way() -> None:
    """As `kubectl exec` finds it: ports and memory are taken, by us."""
    ours = {"ports": (Port("API", 8000, "rayseek"),), "gpus": (TAKEN,) * 8, "own_ranks": 8}
    assert {f.state for f in diagnose(NODE, replace(SOUND, **ours))} == {"ok"}


@given(st.integers(0, 200 * GIB), st.integers(0, 200 * GIB), st.integers(1, 100 * GIB))
def test_memory_is_enough_or_it_is_not(there: int, free: int, wanted: int) -> None:
    free = min(free, there)
    on_gpus = replace(SOUND, gpus=(*(Gpu("H800", 2**40, 2**40),) * 7, Gpu("H800", there, free)))
    on_cpu = replace(SOUND, memory=there, memory_free=free)
    for needs, facts in (
        (replace(NODE, rank_bytes=wanted), on_gpus),
        (replace(LAPTOP, node_bytes=wanted), on_cpu),
    ):
        (memory,) = [f for f in diagnose(needs, facts) if f.check == "memory"]
        assert (memory.state == "ok") == (wanted <= free)
        (memory,) = [f for f in diagnose(needs, replace(facts, own_ranks=1)) if f.check == "memory"]
        assert (memory.state == "ok") == (wanted <= there)


def test_needs_of_configs() -> None:
    laptop = needs_of(load_config("laptop"), SMALL)
    assert not laptop.on_gpus and laptop.nodes == 1 and not laptop.misfits
    assert laptop.node_bytes == laptop.rank_bytes > 0
    split = needs_of(load_config("laptop-split"), SMALL)
    assert split.node_bytes > 2 * split.rank_bytes, "four ranks, of two sizes"
    cell = needs_of(load_config("h800-cell-18"), DEEPSEEK_V3)
    assert (cell.accelerator, cell.gpus, cell.rdma, cell.misfits) == ("H800", 8, True, ())
    assert cell.nodes > 18 and 30 * GIB < cell.rank_bytes < 79 * GIB
    unread = needs_of(load_config("h800-cell-18"), None)
    assert unread == replace(cell, rank_bytes=0, node_bytes=0)
    assert needs_of(load_config("h200-8"), DEEPSEEK_V3, ranks=False).on_gpus is False


def test_rdma_ports_as_the_kernel_lists_them(tmp_path: Path) -> None:
    for device, state, gids in (("mlx5_0", "4: ACTIVE", "f1"), ("mlx5_1", "1: DOWN", "00")):
        port = tmp_path / device / "ports" / "1"
        (port / "gids").mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
        (port / "gids" / "0").write_text("0000:0000:0000:0000:0000:0000:0000:0000\n")
        (port / "gids" / "3").write_text(f"0000:0000:0000:0000:0000:ffff:0a00:00{gids}\n")
    (tmp_path / "mlx5_1" / "ports" / "1" / "gids" / "3").write_text("0000:0000\n")
    assert list(machine.rdma_ports(tmp_path)) == [
        RdmaPort("mlx5_0", "ACTIVE", frozenset({3})), RdmaPort("mlx5_1", "DOWN")
    ]  # fmt: skip
    assert list(machine.rdma_ports(tmp_path / "none")) == []


def test_packages_that_do_not_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(machine.unmet_requirements("rayseek")) == []
    version = machine._version
    others = {"ray": "2.59.0", "uvloop": "", "triton": "3.6.0"}
    monkeypatch.setattr(machine, "_version", lambda name: others.get(name, version(name)))
    lines = "\n".join(machine.unmet_requirements("rayseek"))
    assert "ray[serve]" not in lines
    assert "rayseek needs ray==2.60.0, here is 2.59.0" in lines
    assert "rayseek needs uvloop, which is not installed" in lines
    assert "triton==3.7.1, here is 3.6.0" in lines


def test_this_machine_has_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(machine, "PATIENCE_S", 0.2)
    facts = machine.facts_of_this_machine(Needs())
    assert 0 < facts.memory_free <= facts.memory
    assert facts.shm and facts.kernels and facts.installed.startswith("ray 2.60.0, torch 2")
    assert facts.ray_cluster is not None and "no answer within" in facts.ray_cluster.problem
    on_gpus = machine.facts_of_this_machine(replace(NODE, gpus=1))
    assert {f.check for f in diagnose(NODE, on_gpus)} >= {"GPUs", "driver"}
