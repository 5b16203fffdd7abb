"""Every metric of ours, and how it is published through Ray.

Ray's agent on each node serves them to Prometheus as `ray_<name>`, with the labels of the Serve
replica beside ours. `METRICS` is the one list: dashboards and alerts are checked against it.
Ranks publish nothing: their leader takes their pulse once a second and publishes for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Kind = Literal["counter", "gauge", "histogram"]

QUICK_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)
LONG_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
TOKENS = (1.0, 8.0, 32.0, 128.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 65536.0, 131072.0)
SERVE_LABELS = ("application", "deployment", "replica")  # Ray adds them
OF_UNIT, OF_RANK = ("unit", "role"), ("unit", "role", "rank")


@dataclass(frozen=True, slots=True)
class Metric:
    """`labels`: ours. `buckets`: upper edges, of a histogram."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def exported(self) -> tuple[str, ...]:
        """The names that Prometheus sees."""
        name = f"ray_{self.name}"
        if self.kind == "histogram":
            return (f"{name}_bucket", f"{name}_sum", f"{name}_count")
        return (name,)


def _counter(name: str, help: str, *labels: str) -> Metric:
    return Metric(f"rayseek_{name}_total", "counter", help, labels)


def _gauge(name: str, help: str, *labels: str) -> Metric:
    return Metric(f"rayseek_{name}", "gauge", help, labels)


def _histogram(name: str, help: str, buckets: tuple[float, ...], *labels: str) -> Metric:
    return Metric(f"rayseek_{name}", "histogram", help, labels, buckets)


INGRESS = (
    _counter("requests", "Sequences that ended, by key and how: stop, length, error, cancelled, "
             "refused by the queue or the engine.", "key", "finish"),
    _counter("http_responses", "HTTP answers, by route and status.", "route", "status"),
    _counter("prompt_tokens", "Prompt tokens of requests that reached the engine.", "key"),
    _counter("cached_prompt_tokens", "Of these, taken from the prefix cache.", "key"),
    _counter("generation_tokens", "Tokens made.", "key"),
    _counter("requests_moved", "Requests that went on at another rank after theirs had died."),
    _gauge("requests_running", "Sequences of this ingress at the engine."),
    _gauge("requests_waiting", "Sequences of this ingress in the queue by keys."),
    _histogram("queue_seconds", "Wait in the queue by keys.", QUICK_S),
    _histogram("time_to_first_token_seconds", "From the request to its first token.", QUICK_S),
    _histogram("inter_token_seconds", "Mean time between an answer's tokens.", TOKEN_S),
    _histogram("longest_pause_seconds", "Longest time between two news of an answer.", QUICK_S),
    _histogram("request_seconds", "From the request to its last token.", LONG_S),
    _histogram("request_prompt_tokens", "Prompt tokens of a request.", TOKENS),
    _histogram("request_generation_tokens", "Tokens of an answer.", TOKENS),
)  # fmt: skip

UNIT = (
    _gauge("kv_pages", "KV pages of a rank.", *OF_RANK),
    _gauge("kv_pages_used", "KV pages in use; one that sequences share is one.", *OF_RANK),
    _gauge("batch_sequences", "Sequences that run on a rank.", *OF_RANK),
    _gauge("rank_requests_waiting", "Requests queued at a rank.", *OF_RANK),
    _gauge("prompt_tokens_queued", "Tokens to compute of the requests queued.", *OF_RANK),
    _gauge("draft_depth", "Tokens that are drafted for a sequence.", *OF_RANK),
    _gauge("draft_tokens_predicted", "Tokens/s that a rank expects of each depth of drafts, from "
           "which it chooses.", *OF_RANK, "depth"),
    _gauge("rank_at_seconds", "How long a process that has work is where it is.", *OF_RANK),
    _counter("steps", "Steps of a rank's engine.", *OF_RANK),
    _counter("step_seconds", "Time of the engine's thread: plan, model, sample, draft, and idle "
             "between steps.", *OF_RANK, "stage"),
    _counter("rows", "Rows computed: of prompts, or of sequences that decode.", *OF_RANK, "kind"),
    _counter("preemptions", "Sequences that gave their pages back and are computed again.",
             *OF_RANK),
    _counter("drafted_tokens", "Tokens drafted, by how far ahead.", *OF_RANK, "depth"),
    _counter("accepted_draft_tokens", "Of these, those that came true.", *OF_RANK, "depth"),
    _counter("exchange_seconds", "Time in the exchange of rows with the experts, by stage: send, "
             "counts, dispatch, experts, return, combine.", *OF_RANK, "stage"),
    _counter("exchange_bytes", "Bytes of rows sent to other ranks.", *OF_RANK),
    _gauge("expert_imbalance", "Rows of the busiest rank over the mean, by layer: 1 is perfect.",
           *OF_UNIT, "layer"),
    _gauge("unit_expert_imbalance", "Time of all expert layers over that in perfect balance.",
           *OF_UNIT),
    _counter("expert_rows", "Rows that each expert got, all layers together.", *OF_UNIT, "expert"),
    _counter("experts_taken", "Experts that a rank took in: copied from another, read from the "
             "checkpoint; refused are copies that came damaged.", *OF_RANK, "how"),
    _counter("expert_bytes_taken", "Bytes of those copied and those read.", *OF_RANK, "how"),
    _gauge("placement_version", "Version of the experts' placement.", *OF_UNIT),
    _gauge("unit_epoch", "Number of the plan in force, ever larger; 0: there is none.", *OF_UNIT),
    _gauge("unit_ranks", "Ranks that take part.", *OF_UNIT, "kind"),
    _gauge("unit_ranks_wanted", "Ranks that the config asks for.", *OF_UNIT, "kind"),
    _gauge("unit_problems", "Ways in which the unit is less than the config asks for.", *OF_UNIT),
    _counter("rank_deaths", "Ranks that died, or were killed because they hung.", *OF_UNIT),
    _counter("transfer_requests", "Requests whose pages were to be fetched from a prefill rank: "
             "fetched, partly, fallback (computed here).", *OF_RANK, "outcome"),
    _counter("transfer_pages", "KV pages: fetched, sent, corrupted, repeated.", *OF_RANK, "what"),
    _counter("transfer_bytes", "Bytes of the pages fetched.", *OF_RANK),
    _counter("transfer_seconds", "From asking for pages to having them, summed.", *OF_RANK),
    _counter("transfer_failures", "Transfers that heard nothing for too long, and connections "
             "lost.", *OF_RANK, "what"),
)  # fmt: skip

METRICS = INGRESS + UNIT


class Meter(Protocol):
    """Where values go; `labels` are exactly those of the metric."""

    def add(self, name: str, amount: float, **labels: str) -> None:
        """Count a counter up."""

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Enter a value into a histogram."""


class RayMeter:
    """Metrics of a Serve replica. Names are given without `rayseek_` and `_total`."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        from ray.serve import metrics as of_serve

        self._by_name: dict[str, Any] = {}
        for m in metrics:
            if m.kind == "counter":
                made = of_serve.Counter(m.name, m.help, m.labels)
            elif m.kind == "gauge":
                made = of_serve.Gauge(m.name, m.help, m.labels)
            else:
                made = of_serve.Histogram(m.name, m.help, list(m.buckets), m.labels)
            self._by_name[short(m)] = made

    def add(self, name: str, amount: float, **labels: str) -> None:
        if amount > 0:  # Ray refuses to count nothing
            self._by_name[name].inc(amount, labels)

    def set(self, name: str, value: float, **labels: str) -> None:
        self._by_name[name].set(value, labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        self._by_name[name].observe(value, labels)


class NoMeter:
    """Where there is no Ray."""

    def add(self, name: str, amount: float, **labels: str) -> None:
        pass

    def set(self, name: str, value: float, **labels: str) -> None:
        pass

    def observe(self, name: str, value: float, **labels: str) -> None:
        pass


def short(metric: Metric) -> str:
    """The name as our code uses it."""
    return metric.name.removeprefix("rayseek_").removesuffix("_total")


class Totals:
    """Counters out of totals that others keep: what is new since the last look is added.

    `source`: who counts; a successor counts from zero, and so do we with it. Who takes another
    place goes on counting there: what is known of it does not depend on the label `rank`.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._seen: dict[str, dict[tuple[str, tuple[str, ...]], float]] = {}

    def take(self, source: str, name: str, total: float, **labels: str) -> None:
        seen = self._seen.setdefault(source, {})
        key = (name, tuple(value for label, value in labels.items() if label != "rank"))
        before = seen.get(key, 0.0)
        if total > before:
            self._meter.add(name, total - before, **labels)
            seen[key] = total

    def forget(self, present: Mapping[str, object]) -> None:
        """Drop the sources that are gone."""
        self._seen = {s: seen for s, seen in self._seen.items() if s in present}
