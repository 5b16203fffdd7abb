"""What a rank on a GPU asks for; nothing here needs one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rayseek.cluster import build_unit, participant
from rayseek.cluster.config import EngineSettings, ExchangeSettings
from rayseek.cluster.group import ExchangeBroken
from rayseek.cluster.participant import Broken
from rayseek.cluster.placement import make_placement
from rayseek.cluster.plan import Member, UnitPlan
from rayseek.cluster.spec import RankSpec
from rayseek.kernels.cuda import CudaOps
from rayseek.kernels.select import Choice


def test_its_groups_are_of_its_gpu(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def through(*arguments: Any, **_: Any) -> None:
        asked.append(arguments[5])
        raise ExchangeBroken("as far as this goes")

    monkeypatch.setattr(build_unit, "device_for", lambda preference: "cuda")
    monkeypatch.setattr(
        build_unit, "choose_ops", lambda device, *_: Choice(CudaOps("cpu"), f"on {device}")
    )
    monkeypatch.setattr(participant.Group, "through", through)
    spec = RankSpec(
        "decode", str(tiny_path), EngineSettings(kernels="cuda"), ExchangeSettings(),
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
