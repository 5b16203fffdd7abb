"""The deployment graph: which Serve deployments there are, and how they are bound together."""

from __future__ import annotations

from pathlib import Path

from ray import serve
from ray.serve import Application

from rayseek.cluster.config import Config
from rayseek.cluster.unit import Unit
from rayseek.serve_app.ingress import Ingress
from rayseek.serve_app.settings import ApiSettings

APP_NAME = "rayseek"
DRAIN_S = 30.0


def build(
    config: Config, model_path: Path, settings: ApiSettings, rank_host: str | None = None
) -> Application:
    """`Ingress` over `Decode` (colocated: its units also prefill and hold every expert).

    rank_host: where ranks listen for ingresses; None: on their node's address in the cluster.
    Classes are wrapped here and not decorated, so that replicas import them by name.
    """
    longest_s = float(config.ingress.longest_stream_s)
    decode = serve.deployment(
        Unit,
        name="Decode",
        num_replicas=config.decode.units,
        placement_group_bundles=[{"CPU": 0.1}, {"CPU": 0.5}],
        placement_group_strategy="PACK",
        ray_actor_options={"num_cpus": 0.1},
        max_ongoing_requests=1000,
        health_check_period_s=5,
        graceful_shutdown_timeout_s=DRAIN_S,
    ).bind(str(model_path), config.engine, rank_host)
    return serve.deployment(
        serve.ingress()(Ingress),
        name="Ingress",
        num_replicas=config.ingress.replicas,
        ray_actor_options={"num_cpus": 0.1},
        max_ongoing_requests=100_000,  # the engine's queue is the one that is bounded
        graceful_shutdown_timeout_s=longest_s,
        health_check_period_s=5,
    ).bind(settings, str(model_path), decode)
