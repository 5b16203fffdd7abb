"""What stands around a cell's RayService: its Service, disruption budgets, the kustomization."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from rayseek.cluster.config import Config
from rayseek.cluster.layout import Layout
from rayseek.serve_app.k8s.groups import INGRESS, groups
from rayseek.serve_app.k8s.pods import selector


def service(config: Config) -> dict[str, Any]:
    """Where a Gateway sends clients: the ingress pods of this cell."""
    ports = [{"name": "http", "port": 80, "targetPort": "serve"}]
    if config.ingress.grpc_port is not None:
        ports.append({"name": "grpc", "port": config.ingress.grpc_port, "targetPort": "grpc"})
    return _object(
        config, "v1", "Service", f"openai-{config.kubernetes.cell}",
        {"type": "ClusterIP", "selector": selector(config, INGRESS), "ports": ports},
    )  # fmt: skip


def budgets(config: Config, plan: Layout) -> list[dict[str, Any]]:
    """No pod of a unit may be evicted, and one of the ingress pods. Integers: pods of an owner
    without a scale subresource know no percentages."""
    kept = {"head": 1} | {group.name: group.most_pods for group in groups(config, plan)}
    kept[INGRESS] = max(1, kept[INGRESS] - 1)
    return [
        _object(
            config, "policy/v1", "PodDisruptionBudget", f"{config.kubernetes.cell}-{name}",
            {"minAvailable": pods, "selector": {"matchLabels": selector(config, name)}},
        )
        for name, pods in kept.items()
    ]  # fmt: skip


def cell_policy(config: Config) -> dict[str, Any]:
    """Pods of a cell reach each other on every port, and no other cell's; and the collector of
    traces, whose pods no selector of ours knows, by its port."""
    cell = {"app.kubernetes.io/instance": config.kubernetes.cell}
    peers = [{"podSelector": {"matchLabels": cell}}]
    egress: list[dict[str, Any]] = [{"to": peers}]
    if config.traces.endpoint:
        url = urlsplit(config.traces.endpoint)
        port = url.port or (443 if url.scheme == "https" else 80)
        egress.append({"ports": [{"protocol": "TCP", "port": port}]})
    return _object(
        config, "networking.k8s.io/v1", "NetworkPolicy", f"{config.kubernetes.cell}-inside",
        {
            "podSelector": {"matchLabels": cell},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": peers}],
            "egress": egress,
        },
    )  # fmt: skip


def kustomization(config: Config) -> dict[str, Any]:
    """Composes base, the rendered files and the components that the config asks for."""
    cell = config.kubernetes
    chosen: list[str] = list(cell.components)
    if cell.gcs == "redis":
        chosen.append("redis-ft")
    if cell.fabric.kind != "none":
        chosen.append(f"rdma-{cell.fabric.kind}")
    if cell.weights.claim is not None:
        chosen.append("weights-pvc")
    if cell.weights.node_path is not None:
        chosen.append("weights-nvme")
    document: dict[str, Any] = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": cell.namespace,
        "resources": ["../../base", "rayservice.yaml", "cell.yaml"],
    }
    if chosen:
        document["components"] = [f"../../components/{name}" for name in sorted(chosen)]
    return document


def _object(
    config: Config, version: str, kind: str, name: str, spec: dict[str, Any]
) -> dict[str, Any]:
    metadata = {"name": name, "namespace": config.kubernetes.namespace}
    return {"apiVersion": version, "kind": kind, "metadata": metadata, "spec": spec}
