"""The RayService of a cell, with the Serve config inside, from the config and its layout."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from rayseek.cluster.autoscaling import replica_ranges, serve_scaling
from rayseek.cluster.config import Config
from rayseek.cluster.layout import Layout
from rayseek.serve_app.application import serve_config
from rayseek.serve_app.deploy import SURGE_PERCENT
from rayseek.serve_app.k8s.groups import INGRESS, Group, groups
from rayseek.serve_app.k8s.pods import (
    autoscaler_options,
    head_pod,
    labels,
    object_store_bytes,
    worker_pod,
)
from rayseek.serve_app.k8s.yaml_text import text

API_VERSION = "ray.io/v1"
DELETION_DELAY_S = 900  # an old cluster's streams may end in this time
REDIS = "redis:6379"  # the Service of k8s/components/redis-ft


def rayservice(config: Config, plan: Layout) -> dict[str, Any]:
    """The whole document. Raises ValueError if the cell could not find model or keys."""
    cell = config.kubernetes
    workers = groups(config, plan)
    spec: dict[str, Any] = {
        "excludeHeadPodFromServeSvc": True,
        "upgradeStrategy": {"type": cell.upgrade},
    }
    if cell.upgrade == "NewCluster":
        spec["rayClusterDeletionDelaySeconds"] = DELETION_DELAY_S
    spec["serveConfigV2"] = text(cell_serve_config(config, plan))
    cluster: dict[str, Any] = {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token", "secretName": "ray-auth"},
    }
    if cell.gcs == "redis":
        password = {"secretKeyRef": {"name": "redis-auth", "key": "password"}}
        cluster["gcsFaultToleranceOptions"] = {
            "backend": "redis",
            "redisAddress": REDIS,
            "redisPassword": {"valueFrom": password},
            "externalStorageNamespace": cell.cell,
        }
    if any(group.scales for group in workers):
        cluster["enableInTreeAutoscaling"] = True
        cluster["autoscalerOptions"] = autoscaler_options()
    cluster["headGroupSpec"] = {
        "serviceType": "ClusterIP",
        "rayStartParams": {
            "num-cpus": "0",
            "num-gpus": "0",
            "object-store-memory": str(object_store_bytes(cell.head)),
        },
        "template": head_pod(config),
    }
    cluster["workerGroupSpecs"] = [_group(config, group) for group in workers]
    spec["rayClusterConfig"] = cluster
    return {
        "apiVersion": API_VERSION,
        "kind": "RayService",
        "metadata": {
            "name": cell.cell,
            "namespace": cell.namespace,
            "labels": dict(list(labels(config, "cell").items())[:2]),
            "annotations": {"ray.io/initializing-timeout": f"{cell.start_minutes}m"},
        },
        "spec": spec,
    }


def _group(config: Config, group: Group) -> dict[str, Any]:
    return {
        "groupName": group.name,
        "replicas": group.replicas,
        "minReplicas": group.least,
        "maxReplicas": group.most,
        "numOfHosts": group.hosts,
        "labels": {"role": group.name},
        "rayStartParams": {"object-store-memory": str(object_store_bytes(group.size))},
        "template": worker_pod(config, group),
    }


def cell_serve_config(config: Config, plan: Layout) -> dict[str, Any]:
    """What `rayseek config render` writes, with each deployment bound to its group's pods."""
    file, ranges = serve_config(config), replica_ranges(config)
    deployments: list[dict[str, Any]] = []
    for deployment in plan.deployments:
        options: dict[str, Any] = {"num_cpus": deployment.replica_cpus}
        entry: dict[str, Any] = {"name": deployment.name}
        if deployment.name in ranges:
            entry["autoscaling_config"] = serve_scaling(
                ranges[deployment.name], deployment.replicas
            )
        else:
            entry["num_replicas"] = deployment.replicas
        if deployment.bundles:
            entry["placement_group_bundles"] = [dict(bundle) for bundle in deployment.bundles]
            entry["placement_group_strategy"] = deployment.strategy
            entry["placement_group_bundle_label_selector"] = [{"role": deployment.name.lower()}]
        else:
            options["label_selector"] = {"role": INGRESS}
            pods = config.kubernetes.ingress_pods
            most = deployment.replicas + -(-deployment.replicas * SURGE_PERCENT // 100)
            entry["max_replicas_per_node"] = -(-most // pods)
        deployments.append({**entry, "ray_actor_options": options})
    file["applications"][0]["deployments"] = deployments
    return file
