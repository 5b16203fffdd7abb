"""What leaders tell: counters that only count up, gauges of who is there, views of lone and split
units."""

from __future__ import annotations

import ast
import json
import logging
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayseek.cluster import metrics
from rayseek.cluster.copies import Taken
from rayseek.cluster.expert_load import ExpertLoad
from rayseek.cluster.logs import JsonLines, fields
from rayseek.cluster.metrics import INGRESS, METRICS, UNIT, Totals, short
from rayseek.cluster.placement import ExpertPlacement
from rayseek.cluster.plan import Exchanged, ExpertRows, Member, Pulse, Wanted, next_plan
from rayseek.cluster.step_clock import Work
from rayseek.cluster.transfer_counters import Transfers
from rayseek.cluster.unit_report import UnitReport, UnitState, places_of

ROOT = Path(metrics.__file__).parents[1]
KINDS = {short(m): m for m in METRICS}
Labels = tuple[tuple[str, str], ...]


class Book:
    """A meter that refuses what Prometheus would: unknown names, wrong kinds, wrong labels."""

    def __init__(self) -> None:
        self.values: dict[str, dict[Labels, float]] = defaultdict(lambda: defaultdict(float))

    def _check(self, name: str, kind: str, labels: dict[str, str]) -> Labels:
        assert KINDS[name].kind == kind and set(labels) == set(KINDS[name].labels), name
        assert all(isinstance(v, str) for v in labels.values())
        return tuple(sorted(labels.items()))

    def add(self, name: str, amount: float, **labels: str) -> None:
        assert amount >= 0
        self.values[name][self._check(name, "counter", labels)] += amount

    def set(self, name: str, value: float, **labels: str) -> None:
        self.values[name][self._check(name, "gauge", labels)] = value

    def observe(self, name: str, value: float, **labels: str) -> None:
        self.values[name][self._check(name, "histogram", labels)] += value

    def total(self, name: str, **labels: str) -> float:
        wanted = set(labels.items())
        return sum(v for key, v in self.values[name].items() if wanted <= set(key))


class Load:
    """As `engine.Load`, without torch."""

    def __init__(self, **values: int) -> None:
        self.running, self.waiting = values.get("running", 0), values.get("waiting", 0)
        self.pages_held, self.pages_total = values.get("pages_held", 0), 100
        self.prompt_tokens_queued, self.parked = values.get("queued", 0), values.get("parked", 0)
        self.draft_depth, self.drafted, self.accepted = 1, (10, 4), (8, 2)
        self.draft_rates = 900.0, 1200.0, 1100.0


def pulse(steps: int, seconds: float = 1.0, **load: int) -> Pulse:
    work = Work(steps, 1, steps * 100, steps * 10, {"idle": 5.0, "model": seconds})
    return Pulse(
        0, steps, "step", False, False, 0.5, load=Load(**load), work=work,  # type: ignore[arg-type]
        exchanged=Exchanged(steps * 7, {"experts": seconds / 2}),
        transfers=Transfers(fetched=steps), taken=Taken(steps, steps * 40, 8, 320, steps // 2),
    )  # fmt: skip


ALONE = Wanted(1, 0, 0, 4, 1, (3, 4))
SPLIT = Wanted(2, 2, 0, 4, 1, (3, 4))


def test_metrics_are_named_as_prometheus_wants_them() -> None:
    assert len(KINDS) == len(METRICS) == len({m.name for m in METRICS})
    for m in METRICS:
        assert (m.kind == "counter") == m.name.endswith("_total")
        assert bool(m.buckets) == (m.kind == "histogram") and list(m.buckets) == sorted(m.buckets)
        assert m.name.startswith("rayseek_") and m.help.endswith(".")
        assert not {"le", "quantile", *metrics.SERVE_LABELS} & set(m.labels)


def test_every_metric_has_a_user() -> None:
    """Each name is a string somewhere in the files that publish."""
    for group, files in (
        (UNIT, ["cluster/unit_report.py"]),
        (INGRESS, ["serve_app/observer.py"]),
    ):
        nodes = [n for f in files for n in ast.walk(ast.parse((ROOT / f).read_text()))]
        said = {n.value for n in nodes if isinstance(n, ast.Constant)}
        assert {short(m) for m in group} <= said, {short(m) for m in group} - said


@given(st.lists(st.lists(st.integers(0, 50), max_size=6), max_size=5))
def test_totals_follow_generations(generations: list[list[int]]) -> None:
    """Each process counts from zero; what is published is the sum of their last words. What is
    read a little late, or out of order, is not counted twice."""
    book = Book()
    totals = Totals(book)
    for number, readings in enumerate(generations):
        for reading in readings:
            totals.take(str(number), "steps", reading, unit="u", role="decode", rank="attention0")
        totals.forget({})
    assert book.total("steps") == sum(max(g, default=0) for g in generations)


def test_lone_rank_and_its_successor() -> None:
    book = Book()
    report = UnitReport("u", "decode", ALONE, book, places=16)
    for ingress, waiting, when in (("gone", 9.0, 0.5), ("one", 4.0, 9.0), ("two", 1.5, 9.0)):
        report.hear_of_queue(ingress, waiting, when)
    report.hear_of_queue("one", 3.0, 10.0)
    report.hear_of_queue("one", 4.0, 10.5)
    placement = ExpertPlacement(0, {3: (0, 1, 2, 3), 4: (0, 1, 2, 3)}, 4, (0,))
    load = ExpertLoad(ALONE.layers, 4, 60)
    rows = ExpertRows(0, np.array([[9, 1, 0, 0], [0, 0, 4, 6]]))
    member = Member("a", "attention", "n", "")
    report.take(10.0, {"a": pulse(5, running=3, pages_held=40, queued=500)}, [member])
    load.add(placement, 0, rows.rows)
    report.count_experts(placement, 0, rows)
    now = pulse(9, 1.5, running=3, pages_held=40, queued=500, waiting=5, parked=3)
    report.take(11.0, {"a": now}, [member])
    state = UnitState(None, [member], placement, load.rows, ["one thing is wrong"], 0)
    report.publish(state)
    assert book.total("kv_pages_used", rank="attention0") == 40
    assert book.total("draft_tokens_predicted", depth="1") == 1200
    assert book.total("steps") == 9 and book.total("rows", kind="prompt") == 900
    assert book.total("expert_rows", expert="0") == 9 and book.total("expert_rows") == 20
    assert book.total("experts_taken", how="copied") == 9
    assert book.total("experts_taken", how="read") == 8
    assert book.total("experts_taken", how="refused") == 4
    assert book.total("expert_bytes_taken") == 9 * 40 + 320
    assert book.total("unit_problems") == 1 and book.total("unit_ranks", kind="attention") == 1
    stats = report.to_scale_by(placement, load.rows)
    assert stats["kv_used"] == 0.4 and stats["prompt_tokens_queued"] == 500
    assert stats["waiting"] == 2, "whose pages are on their way need no more decode units"
    assert stats["places"] == 16 and stats["outside"] == 5.5
    assert stats["step_s"] == pytest.approx(0.5 / 4)
    assert stats["prompt_tokens_per_s"] == pytest.approx(400 / 0.5)
    assert all(type(v) is float for v in stats.values()), "Serve takes numbers only"

    view = json.loads(json.dumps(asdict(report.view(state))))
    assert view["ranks"][0]["place"] == "attention0" and view["ranks"][0]["rows_per_s"] == 440
    assert view["experts"]["rows"] == [[9, 1, 0, 0], [0, 0, 4, 6]]
    assert view["experts"]["imbalance"] == [1, 1]  # one holder has it all

    report.take(12.0, {}, [])  # it died
    report.publish(UnitState(None, [], placement, load.rows, [], 1))
    assert book.total("kv_pages_used") == 0 and book.total("batch_sequences") == 0
    report.take(13.0, {"b": pulse(2)}, [replace(member, name="b")])
    assert book.total("steps") == 11 and book.total("rank_deaths") == 1


def test_split_unit() -> None:
    book = Book()
    report = UnitReport("u", "decode", SPLIT, book)
    names = ["x", "a", "y", "b", "z"]
    members = [
        Member(n, "expert" if n in "xyz" else "attention", "node", f"h:{i}")
        for i, n in enumerate(names)
    ]
    loads = {3: [8.0, 0.0, 0.0, 0.0], 4: [1.0, 1.0, 1.0, 1.0]}
    plan = next_plan(None, members, SPLIT, loads)
    assert not isinstance(plan, str)
    assert set(places_of(plan.members).values()) == {
        "attention0", "attention1", "expert0", "expert1",
    }  # fmt: skip
    silent = replace(pulse(1), load=None, work=None)
    for now in (1.0, 2.0):
        expert = replace(silent, exchanged=Exchanged(0, {"experts": now * 0.7}))
        report.take(now, {"a": pulse(1), "b": None, "x": expert, "y": expert, "z": silent},
                    plan.members)  # fmt: skip
    state = UnitState(plan, members, plan.placement, loads, [], 3)
    report.publish(state)
    assert book.total("expert_imbalance", layer="3") == 2  # all rows at one of two
    assert book.total("expert_imbalance", layer="4") == 1
    assert book.total("unit_expert_imbalance") == pytest.approx((8 + 2) / (4 + 2))
    view = report.view(state)
    assert [r.place for r in view.ranks] == [
        "attention0", "attention1", "expert0", "expert1", "spare",
    ]  # fmt: skip
    assert view.experts is not None and view.experts.holders == ("expert0", "expert1")
    stats = report.to_scale_by(plan.placement, loads)
    assert stats["experts"] == 3 and stats["expert_busy"] == pytest.approx(1.4 / 3)


def split_members(*names: str) -> list[Member]:
    return [Member(n, "expert" if n > "m" else "attention", "n", f"h:{n}") for n in names]


def test_who_takes_another_place_is_not_counted_again() -> None:
    """A survivor moves up in the plan: what it did before is in the series of its old place."""
    book = Book()
    report = UnitReport("u", "decode", SPLIT, book)
    both, survivor = split_members("a", "b"), split_members("b")
    report.take(1.0, {"a": pulse(10), "b": pulse(20)}, both)
    assert book.total("steps", rank="attention1") == 20
    report.take(2.0, {"b": pulse(25)}, survivor)
    assert book.total("steps", rank="attention0") == 10 + 5
    assert book.total("steps") == 10 + 25
    assert book.total("experts_taken", how="copied") == 10 + 25


def test_nobody_counts_as_another_kind_before_there_is_a_plan() -> None:
    book = Book()
    report = UnitReport("u", "decode", SPLIT, book)
    loading = replace(pulse(3), load=None, work=None)
    report.take(1.0, {"x": loading, "a": pulse(5)}, split_members("x", "a"))
    assert book.total("experts_taken", how="copied", rank="expert0") == 3
    assert book.total("experts_taken", how="copied", rank="attention0") == 5
    view = report.view(UnitState(None, split_members("x", "a"), None, {}, [], 0))
    assert [r.place for r in view.ranks] == ["attention0", "expert0"]


def test_who_is_gone_stands_nowhere() -> None:
    """Else the last word of one that hung would be an alarm for ever."""
    book = Book()
    report = UnitReport("u", "decode", SPLIT, book)
    everybody = split_members("a", "b", "x", "y")
    stuck = replace(pulse(1, running=2, queued=70), since_s=60.0)
    report.take(1.0, {m.name: stuck for m in everybody}, everybody)
    assert book.total("rank_at_seconds") == 240 and book.total("prompt_tokens_queued") == 280
    report.take(2.0, {"a": pulse(2), "b": None, "x": pulse(2)}, everybody)
    assert book.total("rank_at_seconds", rank="expert1") == 0
    assert book.total("rank_at_seconds", rank="attention1") == 60, "it is only silent"
    report.take(3.0, {"a": pulse(3), "x": pulse(3)}, everybody)
    assert book.total("rank_at_seconds", rank="attention1") == 0
    assert book.total("prompt_tokens_queued", rank="attention1") == 0


def test_log_lines_are_json() -> None:
    record = logging.LogRecord("rayseek.x", logging.INFO, "f", 1, "said %r", ("\n\x00",), None)
    for name, value in fields(request="id-1", tokens=3)["fields"].items():
        record.__dict__.setdefault("fields", {})[name] = value
    line = JsonLines("decode-1").format(record)
    assert "\n" not in line
    said = json.loads(line)
    assert (said["request"], said["tokens"], said["process"]) == ("id-1", 3, "decode-1")
    assert said["level"] == "INFO" and said["time"].endswith("+00:00")
