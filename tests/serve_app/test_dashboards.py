"""Dashboards and alerts name only metrics and labels that there are, and the files are fresh."""

from __future__ import annotations

import re

import pytest

from rayseek.cluster.metrics import METRICS, SERVE_LABELS
from rayseek.serve_app.k8s.dashboards import ALERTS, DASHBOARDS, FOLDER, dashboard, files

EXPORTED = {name: metric for metric in METRICS for name in metric.exported}
QUERIES = [
    (f"{name}: {panel.title}", query, legend)
    for name, (_, _, panels) in DASHBOARDS.items()
    for panel in panels
    for query, legend in panel.queries
] + [(alert.name, alert.query, alert.summary) for alert in ALERTS]


@pytest.mark.parametrize(("where", "query", "legend"), QUERIES)
def test_query(where: str, query: str, legend: str) -> None:
    named = list(re.finditer(r"\b(ray_\w+)(?:\{([^}]*)\})?", query))
    assert named and query.count("(") == query.count(")"), query
    by = {label for group in re.findall(r" by \(([^)]*)\)", query) for label in group.split(", ")}
    for match in named:
        name, selector = match[1], match[2] or ""
        metric = EXPORTED[name]
        sums = re.findall(r"\b(?:sum|max|avg)(?: by \(([^)]*)\))? ?\(", query[: match.start()])
        own = {label for label in (sums[-1] if sums else "").split(", ") if label}
        labels = {*metric.labels, *SERVE_LABELS, *(["le"] if name.endswith("_bucket") else [])}
        assert {s.split("=")[0].rstrip("!") for s in selector.split(",") if s} <= labels, query
        assert own <= labels, f"{query}: no such label to sum by"
        ranged = re.search(rf"{name}(\{{[^}}]*\}})?\[", query) is not None
        assert ranged == (metric.kind != "gauge"), f"{query}: counters are read as rates"
    shown = set(re.findall(r"\{\{ ?(?:\$labels\.)?(\w+) ?\}\}", legend))
    assert shown <= by, f"{legend}: the query does not keep it"


def test_every_metric_is_on_a_dashboard() -> None:
    said = " ".join(query for _, query, _ in QUERIES)
    assert [m.name for m in METRICS if not any(name in said for name in m.exported)] == []


@pytest.mark.parametrize("name", DASHBOARDS)
def test_layout(name: str) -> None:
    """Variables that queries use are there, and panels lie beside each other."""
    made = dashboard(name)
    variables = {v["name"] for v in made["templating"]["list"]}
    taken = set()
    for panel in made["panels"]:
        place = panel["gridPos"]
        cells = {(x, place["y"]) for x in range(place["x"], place["x"] + place["w"])}
        assert not cells & taken and place["x"] + place["w"] <= 24
        taken |= cells
        for target in panel["targets"]:
            used = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"}
            assert used <= variables, panel["title"]


def test_alerts_say_what_to_do() -> None:
    assert len({a.name for a in ALERTS}) == len(ALERTS)
    for alert in ALERTS:
        assert alert.severity in ("warning", "critical") and len(alert.runbook) > 40


def test_files_are_fresh() -> None:
    for name, text in files().items():
        assert (FOLDER / name).read_text() == text, "python -m rayseek.serve_app.k8s.dashboards"
