"""What KubeRay 1.7 refuses after the API server has taken it, or takes and does not do."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from rayseek.serve_app.k8s.manifests import Finding, Manifests, rule

STRATEGIES = ("None", "NewCluster", "NewClusterWithIncrementalUpgrade")
MANAGERS = ("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue")
GATED = ("networkPolicy", "historyServerOptions")  # alpha; rejected while their gates are off
FREE = ("replicas", "minReplicas", "maxReplicas", "scaleStrategy", "suspend")  # of groups


@rule
def cell_name(all_: Manifests) -> Iterator[Finding]:
    for cell in all_.cells:
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,45}[a-z0-9])?", cell.metadata["name"]):
            yield cell.name, "a RayService's name has at most 47 of a-z, 0-9 and -, a letter first"


@rule
def group_name(all_: Manifests) -> Iterator[Finding]:
    for cell in all_.cells:
        for name, count in Counter(pod.name for pod in cell.groups).items():
            if count > 1 or not re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", name):
                yield cell.name, f"groupName {name!r}: must be a DNS name, and each its own"


@rule
def replica_range(all_: Manifests) -> Iterator[Finding]:
    for where, _, pod in all_.in_cells(heads=False):
        low, high = pod.group["minReplicas"], pod.group["maxReplicas"]
        now = pod.group.get("replicas", low)
        if not 0 <= low <= now <= high:
            yield where, f"not minReplicas {low} <= {now} <= {high}"


@rule
def upgrade_type(all_: Manifests) -> Iterator[Finding]:
    for cell in all_.cells:
        strategy = cell.spec.get("upgradeStrategy", {})
        kind = strategy.get("type")
        if kind not in STRATEGIES:
            yield cell.name, f"upgradeStrategy.type is {kind!r}, not one of {', '.join(STRATEGIES)}"
        elif kind == STRATEGIES[2]:
            yield cell.name, "a decode unit is one replica and cannot move by percent: add a cell"


@rule
def deletion_delay(all_: Manifests) -> Iterator[Finding]:
    for cell in all_.cells:
        delay = cell.spec.get("rayClusterDeletionDelaySeconds", 60)
        if cell.spec.get("upgradeStrategy", {}).get("type") == "NewCluster" and delay < 900:
            yield cell.name, f"rayClusterDeletionDelaySeconds {delay} cuts streams: 900 or more"


@rule
def initializing_timeout(all_: Manifests) -> Iterator[Finding]:
    for cell in all_.cells:
        value = cell.metadata.get("annotations", {}).get("ray.io/initializing-timeout", "")
        if not re.fullmatch(r"\d+|(\d+h)?(\d+m)?(\d+s)?", value) or not value:
            yield cell.name, f"ray.io/initializing-timeout {value!r} is not like 90m or 5400"


@rule
def token_auth(all_: Manifests) -> Iterator[Finding]:
    for cell in all_.cells:
        auth = cell.cluster.get("authOptions", {})
        if auth.get("mode") != "token" or not auth.get("secretName"):
            yield cell.name, "authOptions: say mode: token and secretName; there is no default"
        if "enableK8sTokenAuth" in auth:
            yield cell.name, "authOptions.enableK8sTokenAuth: KubeRay refuses it in a RayService"


@rule
def manager(all_: Manifests) -> Iterator[Finding]:
    for cell in all_.cells:
        for where in (cell.spec, cell.cluster):
            if where.get("managedBy", MANAGERS[0]) not in MANAGERS:
                yield cell.name, f"managedBy {where['managedBy']!r}: not {' or '.join(MANAGERS)}"


@rule
def serve_port(all_: Manifests) -> Iterator[Finding]:
    for _, cell, pod in all_.in_cells():
        if pod.name == "head" and "serve" not in pod.ports:
            yield cell.name, "the head has no port named serve: KubeRay would make no service"


@rule
def gated_field(all_: Manifests) -> Iterator[Finding]:
    for cell in all_.cells:
        for name in GATED:
            if name in cell.cluster:
                yield cell.name, f"{name}: an alpha feature that is off rejects the whole object"


@rule
def start_parameter(all_: Manifests) -> Iterator[Finding]:
    for where, _, pod in all_.in_cells():
        for name in {"labels", "resources"} & set(pod.group.get("rayStartParams", {})):
            yield where, f"rayStartParams.{name}: use the group's {name}"


@rule
def autoscaler(all_: Manifests) -> Iterator[Finding]:
    for cell in all_.cells:
        elastic = [p.name for p in cell.groups if p.lowest != p.highest]
        options = cell.cluster.get("autoscalerOptions", {})
        if elastic and not cell.cluster.get("enableInTreeAutoscaling"):
            yield cell.name, f"{', '.join(elastic)}: a range, but enableInTreeAutoscaling is off"
        elif cell.cluster.get("enableInTreeAutoscaling") and options.get("version") != "v2":
            yield cell.name, "autoscalerOptions.version: say v2"


@rule
def kueue_autoscaling(all_: Manifests) -> Iterator[Finding]:
    for cell in all_.cells:
        queued = "kueue.x-k8s.io/queue-name" in cell.metadata.get("labels", {})
        if queued and cell.cluster.get("enableInTreeAutoscaling"):
            yield cell.name, "Kueue refuses clusters that scale: no ranges, or no queue"


@rule
def frozen(all_: Manifests) -> Iterator[Finding]:
    """With `upgradeStrategy: None`, KubeRay ignores an edit of these without a word."""
    for cell in all_.cells:
        old = all_.released.get(cell.name)
        if old is None or cell.spec.get("upgradeStrategy", {}).get("type") != "None":
            continue
        for path in _differences(_fixed(old.cluster), _fixed(cell.cluster)):
            yield cell.name, f"rayClusterConfig{path} changed: not applied to a released cell"


def _fixed(cluster: Any) -> Any:
    copied = deepcopy(cluster)
    copied.pop("suspend", None)
    for group in copied.get("workerGroupSpecs", []):
        for name in FREE:
            group.pop(name, None)
        group["template"]["spec"].pop("tolerations", None)
        group["template"]["spec"].pop("schedulingGates", None)
    return copied


def _differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from _differences(one, other, f"{path}[{index}]")
    elif old != new:
        yield path
