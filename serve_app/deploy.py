"""The deployment graph: which Serve deployments there are, and how they are bound together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application

from rayseek.cluster.autoscaling import replica_ranges, serve_scaling
from rayseek.cluster.config import Config
from rayseek.cluster.experts import Experts
from rayseek.cluster.layout import Deployment, layout
from rayseek.cluster.unit import Unit
from rayseek.model.config import ModelConfig
from rayseek.serve_app.ingress import Ingress
from rayseek.serve_app.settings import ApiSettings

APP_NAME = "rayseek"
DRAIN_S = 30.0
SURGE_PERCENT = 25  # of ingresses: an update starts new ones before old ones stop

# Serve replaces a replica after three checks in a row that get no answer in time. Leaders do
# nothing that takes long, so nine seconds of silence mean that one hangs; a busy machine's pauses
# are shorter, and a mistake costs what a death does. Meanwhile its ranks serve, but nobody
# replaces those that die.
CHECK_S, CHECK_TIMEOUT_S = 1.0, 3.0


def build(
    config: Config,
    model_path: Path,
    settings: ApiSettings,
    rank_host: str | None = None,
    scaled: bool = False,
    head_ingress: bool = False,
) -> Application:
    """`Ingress` over `Decode` and `Prefill`, whose units find their `Experts` by themselves.

    rank_host: where ranks listen for ingresses; None: on their node's address in the cluster.
    scaled: by the policy of the Serve config file; without one, numbers stay as configured.
    head_ingress: ingresses stay on Ray's first node, where the proxy of a local service is. (Pods
    of their own keep them off the other nodes in Kubernetes.)
    Classes are wrapped here and not decorated, so that replicas import them by name.
    """
    model = ModelConfig.from_pretrained(model_path)
    whole = layout(config, model, str(model_path), rank_host)
    ranges = replica_ranges(config) if scaled else {}
    units = {
        d.name: _inner(Unit, d, ranges.get(d.name)).bind(d.unit)
        for d in whole.deployments
        if d.unit is not None
    }
    experts = [
        _inner(Experts, d, ranges.get(d.name)).bind(d.rank, *(units[name] for name in d.handles))
        for d in whole.deployments
        if d.unit is None and d.rank is not None
    ]
    ingress = whole["Ingress"]
    place = {"resources": {"node:__internal_head__": 0.001}} if head_ingress else {}
    return serve.deployment(
        serve.ingress()(Ingress),
        name=ingress.name,
        num_replicas=ingress.replicas,
        ray_actor_options={"num_cpus": ingress.replica_cpus, **place},
        max_surge_percent=SURGE_PERCENT,
        max_ongoing_requests=100_000,  # the engine's queue is the one that is bounded
        graceful_shutdown_timeout_s=float(config.ingress.longest_stream_s),
        health_check_period_s=5,
    ).bind(settings, str(model_path), list(units.values()), experts)


def _inner(kind: type, deployment: Deployment, scales: tuple[int, int] | None = None) -> Any:
    """scales: between these numbers of replicas, by the application's policy, which is the one
    that waits before it decides."""
    count: dict[str, Any] = {"num_replicas": deployment.replicas}
    if scales is not None:
        count = {"autoscaling_config": serve_scaling(scales, deployment.replicas)}
    return serve.deployment(
        kind,
        name=deployment.name,
        **count,
        placement_group_bundles=[dict(bundle) for bundle in deployment.bundles],
        placement_group_strategy=deployment.strategy,
        ray_actor_options={"num_cpus": deployment.replica_cpus},
        max_ongoing_requests=1000,
        health_check_period_s=CHECK_S,
        health_check_timeout_s=CHECK_TIMEOUT_S,
        graceful_shutdown_timeout_s=DRAIN_S,
    )
