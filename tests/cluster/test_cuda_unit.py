"""What a rank on a GPU asks for, and how its group ends; nothing here needs a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._C import _distributed_c10d as c10d

from rayseek.cluster import build_unit, formed
from rayseek.cluster.config import EngineSettings, ExchangeSettings
from rayseek.cluster.group import ExchangeBroken, Group, Transfer
from rayseek.cluster.participant import Broken
from rayseek.cluster.placement import make_placement
from rayseek.cluster.plan import Member, UnitPlan
from rayseek.cluster.spec import RankSpec
from rayseek.kernels.cuda import CudaOps
from rayseek.kernels.select import Choice


def test_its_groups_are_of_its_gpu_and_end_before_experts_are_loaded(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def group(*arguments: Any, **_: Any) -> None:
        asked.append(arguments[5])
        raise ExchangeBroken("as far as this goes")

    monkeypatch.setattr(build_unit, "device_for", lambda preference: "cuda")
    monkeypatch.setattr(
        build_unit, "choose_ops", lambda device, *_: Choice(CudaOps("cpu"), f"on {device}")
    )
    monkeypatch.setattr(formed, "Group", group)
    spec = RankSpec(
        str(tiny_path), EngineSettings(kernels="cuda"), ExchangeSettings(),
        alone=False, dedicated=False,
    )  # fmt: skip
    broken: list[Broken] = []
    member, _ = build_unit.build_expert_rank("e0", spec, "127.0.0.1", broken.append)
    store = f"127.0.0.1:{member.store_port}"
    plan = UnitPlan(
        0, (Member("e0", "attention", "n", store),), make_placement({1: [1.0] * 8}, [0]), False
    )
    member.commit(plan, None)
    member.idle(lambda: False)
    assert asked == ["cuda"] and [b.reason for b in broken] == ["as far as this goes"]

    member.hear_of(replace(plan, epoch=1))
    assert not member.is_over(0)
    member.hear_of(replace(plan, epoch=2, broken=True))
    assert member.is_over(1) and not member.is_over(2)


class Work:
    """One of NCCL's: completed when it is looked at for the `after`th time."""

    def __init__(self, after: float, error: str = "") -> None:
        self.after, self.error, self.looks, self.stream_waits = after, error, 0, False

    def is_completed(self) -> bool:
        self.looks += 1
        return self.looks >= self.after

    def wait(self) -> None:
        self.stream_waits = True
        if self.error:
            raise RuntimeError(self.error)


class Nccl:
    """What `Group` uses of ProcessGroupNCCL, which torch has on GPUs only."""

    Options = SimpleNamespace
    work = Work(1)
    ends: list[str]

    def __init__(self, store: Any, rank: int, size: int, options: Any) -> None:
        assert options._timeout.total_seconds() == 0.2
        self.ends = []

    def alltoall_base(self, out: Tensor, source: Tensor, *splits: list[int]) -> Work:
        return self.work

    def abort(self) -> None:
        self.ends.append("abort")

    def shutdown(self) -> None:
        self.ends.append("shutdown")
        if self.work.error:
            raise RuntimeError(self.work.error)


@pytest.fixture
def over() -> list[bool]:
    """Not empty: the group has been given up."""
    return []


@pytest.fixture
def group(over: list[bool], monkeypatch: pytest.MonkeyPatch) -> Iterator[Group]:
    monkeypatch.setattr(c10d, "ProcessGroupNCCL", Nccl, raising=False)
    store = c10d.HashStore()
    yield Group(store, "gpu", 0, 1, 0.2, "cuda", over=lambda: bool(over))


def begun(group: Group, work: Work) -> Transfer:
    rows = torch.zeros(2, 3)
    group._group.work = work
    return group.all_to_all(torch.empty_like(rows), rows, [2], [2], "layer 3")


def test_the_host_waits_for_an_exchange(group: Group) -> None:
    work = Work(100)
    begun(group, work).wait()
    assert work.looks == 100 and work.stream_waits
    work = Work(100)
    begun(group, work).wait(on_device=True)
    assert work.looks == 0 and work.stream_waits


@pytest.mark.parametrize(
    "after, error, told, message",
    [
        (2, "remote process exited", False, "layer 3: remote process exited"),
        (1e9, "", True, "layer 3: it stood still, and the group has been given up"),
        (1e9, "", False, "layer 3: it stood still for 0 s"),
    ],
)
def test_a_death_ends_the_waiting(
    group: Group, over: list[bool], after: float, error: str, told: bool, message: str
) -> None:
    """By NCCL's own error, by the plan that says so, or by the time limit; the kernels end too."""
    over.extend([told] * told)
    work = Work(after, error)
    with pytest.raises(ExchangeBroken, match=message):
        begun(group, work).wait()
    assert work.stream_waits == bool(error)  # for nothing else may use what has come
    nccl = group._group
    group.close()
    group.close()
    assert nccl.ends == ["abort"]


@pytest.mark.parametrize("error, ends", [("", ["shutdown"]), ("broke", ["shutdown", "abort"])])
def test_who_leaves_with_all_others_cuts_nobody_off(
    group: Group, error: str, ends: list[str]
) -> None:
    nccl = group._group
    nccl.work = Work(1, error)
    group.close(flush=True)
    assert nccl.ends == ends
