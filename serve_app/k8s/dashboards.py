"""Grafana's dashboards and Prometheus' alerts, written from what is to be seen: `python -m
rayseek.serve_app.k8s.dashboards` writes them into k8s/grafana.

Queries name metrics as Prometheus has them (cluster/metrics.py); `$u` and `$k` are the filters that
a dashboard's variables choose.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parents[2] / "k8s" / "grafana"
UNIT = 'unit=~"$unit",role=~"$role"'


@dataclass(frozen=True, slots=True)
class Panel:
    """queries: (PromQL, legend). unit: Grafana's name for it."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    kind: str = "timeseries"
    width: int = 8


@dataclass(frozen=True, slots=True)
class Alert:
    """`after`: how long it must be true. `runbook`: what to look at, and what to do."""

    name: str
    query: str
    after: str
    severity: str
    summary: str
    runbook: str


def rate(metric: str, labels: str = "", by: str = "") -> str:
    """Of a counter, summed."""
    grouped = f" by ({by})" if by else ""
    return f"sum{grouped} (rate(ray_rayseek_{metric}{{{labels}}}[$__rate_interval]))"


def quantiles(metric: str) -> tuple[tuple[str, str], ...]:
    return tuple(
        (f"histogram_quantile({q}, sum by (le) "
         f"(rate(ray_rayseek_{metric}_bucket[$__rate_interval])))", f"p{round(q * 100)}")
        for q in (0.5, 0.9, 0.99)
    )  # fmt: skip


def gauge(metric: str, labels: str = UNIT, by: str = "unit", of: str = "sum") -> str:
    return f"{of} by ({by}) (ray_rayseek_{metric}{{{labels}}})"


def _share(part: str, whole: str) -> str:
    return f"({part}) / ({whole})"


CACHED = _share(rate("cached_prompt_tokens_total"), rate("prompt_tokens_total"))
KEY = 'key=~"$key"'
DRAFTS = _share(
    rate("accepted_draft_tokens_total", UNIT, "depth"),
    rate("drafted_tokens_total", UNIT, "depth"),
)
KV = _share(gauge("kv_pages_used"), gauge("kv_pages"))

DASHBOARDS: dict[str, tuple[str, tuple[str, ...], tuple[Panel, ...]]] = {
    "overview": ("Rayseek: overview", (), (
        Panel("Requests that ended", "reqps", (
            (rate("requests_total", by="finish"), "{{finish}}"),)),
        Panel("HTTP answers", "reqps", (
            (rate("http_responses_total", by="status"), "{{status}}"),)),
        Panel("Sequences", "short", (
            ("sum(ray_rayseek_requests_running)", "running"),
            ("sum(ray_rayseek_requests_waiting)", "waiting"))),
        Panel("Tokens", "short", (
            (rate("generation_tokens_total"), "out"), (rate("prompt_tokens_total"), "in"),
            (rate("cached_prompt_tokens_total"), "in, cached"))),
        Panel("Prompt tokens from the cache", "percentunit", ((CACHED, "cached"),)),
        Panel("KV pages used", "percentunit", ((KV.replace(UNIT, ""), "{{unit}}"),)),
        Panel("Time to first token", "s", quantiles("time_to_first_token_seconds")),
        Panel("Between tokens (mean of an answer)", "s", quantiles("inter_token_seconds")),
        Panel("Longest pause of an answer", "s", quantiles("longest_pause_seconds")),
        Panel("Whole request", "s", quantiles("request_seconds")),
        Panel("Wait for a turn", "s", quantiles("queue_seconds")),
        Panel("Prompt and answer, median tokens", "short", (
            (quantiles("request_prompt_tokens")[0][0], "prompt"),
            (quantiles("request_generation_tokens")[0][0], "answer"))),
        Panel("Problems of units", "short", ((gauge("unit_problems", ""), "{{unit}}"),)),
        Panel("Ranks that died", "short", ((
            "sum by (unit) (increase(ray_rayseek_rank_deaths_total[$__rate_interval]))",
            "{{unit}}"),)),
        Panel("Requests that moved to another rank", "short", ((
            "sum(increase(ray_rayseek_requests_moved_total[$__rate_interval]))", "moved"),)),
    )),
    "units": ("Rayseek: units", ("unit", "role"), (
        Panel("Ranks", "short", (
            (gauge("unit_ranks", by="unit, kind"), "{{unit}} {{kind}}"),
            (gauge("unit_ranks_wanted", by="unit, kind"), "{{unit}} {{kind}} wanted"))),
        Panel("Age of the plan", "s", ((  # whose number is when it was made, in milliseconds
            f"time() - ({gauge('unit_epoch', of='max')} > 0) / 1000", "{{unit}}"),)),
        Panel("Longest at one place", "s", ((
            gauge("rank_at_seconds", by="unit, rank", of="max"), "{{unit}} {{rank}}"),)),
        Panel("Batch", "short", (
            (gauge("batch_sequences", by="unit, rank"), "{{unit}} {{rank}}"),)),
        Panel("Queued at ranks", "short", (
            (gauge("rank_requests_waiting"), "{{unit}} requests"),
            (gauge("prompt_tokens_queued"), "{{unit}} tokens"))),
        Panel("KV pages used", "percentunit", ((KV, "{{unit}}"),)),
        Panel("Step, by stage", "s", ((_share(
            rate("step_seconds_total", UNIT + ',stage!="idle"', "stage"),
            "scalar(" + rate("steps_total", UNIT) + ")"), "{{stage}}"),)),
        Panel("Part of the time that engines work", "percentunit", ((
            rate("step_seconds_total", UNIT + ',stage!="idle"', "unit, rank"),
            "{{unit}} {{rank}}"),)),
        Panel("Rows", "short", ((rate("rows_total", UNIT, "unit, kind"), "{{unit}} {{kind}}"),)),
        Panel("Drafts that came true", "percentunit", ((DRAFTS, "{{depth}} ahead"),)),
        Panel("Depth of drafts", "short", ((gauge("draft_depth", of="avg"), "{{unit}}"),)),
        Panel("Tokens/s expected of each depth of drafts", "short", ((
            gauge("draft_tokens_predicted", by="unit, depth"), "{{unit}} {{depth}}"),)),
        Panel("Preemptions", "short", ((rate("preemptions_total", UNIT, "unit"), "{{unit}}"),)),
        Panel("Pages handed over", "short", ((
            rate("transfer_pages_total", UNIT, "what"), "{{what}}"),)),
        Panel("Hand-over", "s", ((_share(
            rate("transfer_seconds_total", UNIT),
            rate("transfer_requests_total", UNIT + ',outcome="fetched"')), "of a request"),)),
        Panel("Hand-over", "Bps", ((rate("transfer_bytes_total", UNIT, "unit"), "{{unit}}"),)),
        Panel("Hand-overs by outcome", "short", (
            (rate("transfer_requests_total", UNIT, "outcome"), "{{outcome}}"),
            (rate("transfer_failures_total", UNIT, "what"), "{{what}}"))),
    )),
    "experts": ("Rayseek: experts", ("unit", "role"), (
        Panel("Time of expert layers over perfect balance", "short", ((
            gauge("unit_expert_imbalance", of="max"), "{{unit}}"),), width=12),
        Panel("Experts taken in", "short", ((
            rate("experts_taken_total", UNIT, "how"), "{{how}}"),)),
        Panel("Experts taken in", "Bps", ((
            rate("expert_bytes_taken_total", UNIT, "how"), "{{how}}"),)),
        Panel("Version of the placement", "short", (
            (gauge("placement_version", of="max"), "{{unit}}"),),
              width=12),
        Panel("Busiest rank over the mean, by layer", "short", ((
            gauge("expert_imbalance", by="layer", of="max"), "{{layer}}"),), "heatmap", 24),
        Panel("Rows by expert", "short", ((
            "topk(32, " + rate("expert_rows_total", UNIT, "expert") + ")", "{{expert}}"),),
              "bargauge", 24),
        Panel("Exchange, by stage", "percentunit", ((
            rate("exchange_seconds_total", UNIT, "unit, stage"), "{{unit}} {{stage}}"),), width=12),
        Panel("Exchange", "Bps", ((
            rate("exchange_bytes_total", UNIT, "unit, rank"), "{{unit}} {{rank}}"),), width=12),
    )),
    "keys": ("Rayseek: keys", ("key",), (
        Panel("Requests", "reqps", ((rate("requests_total", KEY, "key"), "{{key}}"),), width=12),
        Panel("Not answered in full", "reqps", ((
            rate("requests_total", KEY + ',finish=~"error|refused"', "key, finish"),
            "{{key}} {{finish}}"),), width=12),
        Panel("Tokens out", "short", ((rate("generation_tokens_total", KEY, "key"), "{{key}}"),)),
        Panel("Tokens in", "short", ((rate("prompt_tokens_total", KEY, "key"), "{{key}}"),)),
        Panel("Tokens in from the cache", "percentunit", ((_share(
            rate("cached_prompt_tokens_total", KEY, "key"),
            rate("prompt_tokens_total", KEY, "key")), "{{key}}"),)),
        Panel("Tokens in 24 h", "short", (
            (f"sum by (key) (increase(ray_rayseek_prompt_tokens_total{{{KEY}}}[24h]))",
             "{{key}} in"),
            (f"sum by (key) (increase(ray_rayseek_generation_tokens_total{{{KEY}}}[24h]))",
             "{{key}} out")), "bargauge", 24),
    )),
}  # fmt: skip

ALERTS = (
    Alert("RayseekErrors", 'sum(rate(ray_rayseek_requests_total{finish="error"}[5m])) > 0.01 * '
          "sum(rate(ray_rayseek_requests_total[5m]))", "5m", "critical",
          "More than 1 % of the answers break off",
          "Look for `reason` in the lines of rayseek.requests; a rank's own log has the trace."),
    Alert("RayseekRefuses", 'sum(rate(ray_rayseek_requests_total{finish="refused"}[5m])) > 0.05 * '
          "sum(rate(ray_rayseek_requests_total[5m]))", "10m", "warning",
          "More than 5 % of the requests are refused",
          "Queues are full: more decode units (autoscaling.decode), or lower limits of a key."),
    Alert("RayseekSlowFirstToken", "histogram_quantile(0.9, sum by (le) "
          "(rate(ray_rayseek_time_to_first_token_seconds_bucket[10m]))) > 10", "10m", "warning",
          "A tenth of the first tokens takes more than 10 s",
          "Dashboard units: queued at ranks? Then more prefill units. KV pages full? More decode."),
    Alert("RayseekKvFull",
          "max by (unit) (ray_rayseek_kv_pages_used / ray_rayseek_kv_pages) > 0.95", "10m",
          "warning", "The KV pages of {{ $labels.unit }} are full",
          "Sequences are preempted or wait: add decode units, or lower engine.max_batch."),
    Alert("RayseekUnitDegraded", "max by (unit) (ray_rayseek_unit_problems) > 0", "10m", "warning",
          "{{ $labels.unit }} is less than the config asks for",
          "The page /cluster says what is missing. A pending pod? `kubectl get pods`, its events."),
    Alert("RayseekUnitGone", 'sum by (unit) (ray_rayseek_unit_ranks{kind="attention"}) == 0', "2m",
          "critical", "{{ $labels.unit }} has no attention rank",
          "Ray dashboard, Serve: the deployment's message; then the newest log of its ranks."),
    Alert("RayseekRanksDie", "sum by (unit) (increase(ray_rayseek_rank_deaths_total[30m])) > 3",
          "0m", "critical", "Ranks of {{ $labels.unit }} die again and again",
          "The leader's log says of what each died. Same node? Cordon it and look at its GPUs."),
    Alert("RayseekRankStalls", "max by (unit, rank) (ray_rayseek_rank_at_seconds) > 30", "0m",
          "warning", "{{ $labels.rank }} of {{ $labels.unit }} stands still",
          "The leader kills it at engine.step_timeout_s; its log names layer and exchange."),
    Alert("RayseekExpertsUneven", "max by (unit) (ray_rayseek_unit_expert_imbalance) > 1.5", "30m",
          "warning", "The experts of {{ $labels.unit }} are out of balance",
          "exchange.rebalance_s 0? Else more redundant_experts for the experts that are hot."),
    Alert("RayseekBadPages",
          'sum(increase(ray_rayseek_transfer_pages_total{what="corrupted"}[30m])) > 0', "0m",
          "warning", "KV pages arrived with wrong checksums",
          "They were fetched again or recomputed. More than a few: suspect memory or a NIC."),
    Alert("RayseekBadExpertCopies",
          'sum(increase(ray_rayseek_experts_taken_total{how="refused"}[30m])) > 0', "0m",
          "warning", "Copies of experts arrived with wrong digests",
          "They were read from the checkpoint. More than a few: suspect memory or a NIC."),
    Alert("RayseekHandOverFails",
          'sum(rate(ray_rayseek_transfer_requests_total{outcome="fallback"}[10m])) > 0.1 * '
          "sum(rate(ray_rayseek_transfer_requests_total[10m]))", "10m", "warning",
          "A tenth of the prompts is computed by decode units after all",
          "Are prefill units up? Timeouts (dashboard units): the network, or transfer.timeout_s."),
)  # fmt: skip


def dashboard(name: str) -> dict[str, Any]:
    """Grafana's JSON of one of DASHBOARDS."""
    title, variables, panels = DASHBOARDS[name]
    found, x, y = [], 0, 0
    for number, panel in enumerate(panels, start=1):
        if x + panel.width > 24:
            x, y = 0, y + 8
        found.append(
            {
                "id": number, "title": panel.title, "type": panel.kind,
                "datasource": {"type": "prometheus", "uid": "${datasource}"},
                "gridPos": {"h": 8, "w": panel.width, "x": x, "y": y},
                "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
                "targets": [
                    {"expr": query, "legendFormat": legend, "refId": chr(ord("A") + i)}
                    for i, (query, legend) in enumerate(panel.queries)
                ],
            }
        )  # fmt: skip
        x += panel.width
    return {
        "uid": f"rayseek-{name}", "title": title, "tags": ["rayseek"], "schemaVersion": 39,
        "version": 1, "editable": True, "refresh": "10s", "timezone": "",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [
            {"name": "datasource", "type": "datasource", "query": "prometheus"},
            *(_variable(variable) for variable in variables),
        ]},
        "panels": found,
    }  # fmt: skip


def _variable(label: str) -> dict[str, Any]:
    metric = "ray_rayseek_requests_total" if label == "key" else "ray_rayseek_unit_problems"
    return {
        "name": label, "type": "query", "query": f"label_values({metric}, {label})",
        "datasource": {"type": "prometheus", "uid": "${datasource}"}, "refresh": 2,
        "includeAll": True, "multi": True, "allValue": ".*", "current": {"text": "All",
                                                                         "value": "$__all"},
    }  # fmt: skip


def rules() -> dict[str, Any]:
    """The PrometheusRule of all alerts."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "rayseek"},
        "spec": {"groups": [{"name": "rayseek", "rules": [
            {"alert": a.name, "expr": a.query, "for": a.after, "labels": {"severity": a.severity},
             "annotations": {"summary": a.summary, "runbook": a.runbook}}
            for a in ALERTS
        ]}]},
    }  # fmt: skip


def files() -> dict[str, str]:
    """Every file of k8s/grafana that is written from here."""
    made = {f"{name}.json": json.dumps(dashboard(name), indent=1) + "\n" for name in DASHBOARDS}
    note = "# Written by `python -m rayseek.serve_app.k8s.dashboards`.\n"
    made["alerts.yaml"] = note + yaml.safe_dump(rules(), sort_keys=False, width=100)
    made["kustomization.yaml"] = (
        "# The dashboards, as ConfigMaps that Grafana's sidecar finds by their label, and alerts.\n"
        "# Written by `python -m rayseek.serve_app.k8s.dashboards`.\n"
    ) + yaml.safe_dump(
        {
            "apiVersion": "kustomize.config.k8s.io/v1alpha1", "kind": "Component",
            "resources": ["alerts.yaml"],
            "configMapGenerator": [
                {"name": f"rayseek-dashboard-{name}", "files": [f"{name}.json"],
                 "options": {"labels": {"grafana_dashboard": "1"}}}
                for name in DASHBOARDS
            ],
            "generatorOptions": {"disableNameSuffixHash": True},
        },
        sort_keys=False,
    )  # fmt: skip
    return made


if __name__ == "__main__":
    for name, text in files().items():
        (FOLDER / name).write_text(text)
