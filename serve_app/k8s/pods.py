"""The pod template of a Ray node: what it may do, what it can write, what it must find.

Every pod runs as uid 1000 with no capabilities on a read-only root; what Ray, Triton and the native
kernels write goes to volumes. Requests equal limits.
"""

from __future__ import annotations

from typing import Any

from rayseek.cluster.cell import FabricSettings, PodSize
from rayseek.cluster.config import Config
from rayseek.serve_app.k8s.groups import INGRESS, Group
from rayseek.serve_app.local import cluster_environment

USER = 1000  # the image's
SHM_PART = 4  # /dev/shm is this part of a pod's memory, at most MAX_SHM_GIB
MAX_SHM_GIB = 64.0
STORE_PART = 4  # Ray's object store is this part of /dev/shm: nothing of ours goes through it
UNIT_GRACE_S = 600
IDLE_S = 300  # before a pod without a unit goes: another unit might find its page cache warm
HOME = "/home/rayseek"
# What nodes with GPUs have a copy of, with `node_path`; other pods are on any node, and read a few
# small files only.
CLAIM = "rayseek-weights"
CONFINED = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
METRICS_PORT, AGENT_PORT, DASHBOARD_PORT = 8080, 52365, 8265
HEAD_PORTS = {
    "gcs-server": 6379, "dashboard": DASHBOARD_PORT, "client": 10001, "metrics": METRICS_PORT,
    "as-metrics": 44217, "dash-metrics": 44227, "dash-agent": AGENT_PORT,
}  # fmt: skip


def labels(config: Config, component: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": "rayseek", **selector(config, component)}


def selector(config: Config, component: str) -> dict[str, str]:
    """The labels by which a component's pods are chosen."""
    return {
        "app.kubernetes.io/instance": config.kubernetes.cell,
        "app.kubernetes.io/component": component,
    }


def head_pod(config: Config) -> dict[str, Any]:
    ports = {**HEAD_PORTS, "serve": config.ingress.port}
    return _pod(config, "head", config.kubernetes.head, ports, {})


def worker_pod(config: Config, group: Group) -> dict[str, Any]:
    ports = {"metrics": METRICS_PORT, "dash-agent": AGENT_PORT}
    if group.name != INGRESS:
        pod = _pod(config, group.name, group.size, ports, _devices(config, group))
        spec = pod["spec"]
        spec["containers"][0]["readinessProbe"] = {  # KubeRay's own asks for a Serve proxy
            "httpGet": {"path": "/api/healthz", "port": AGENT_PORT},
            "periodSeconds": 5, "timeoutSeconds": 5, "failureThreshold": 3,
        }  # fmt: skip
        spec["terminationGracePeriodSeconds"] = UNIT_GRACE_S
        if config.kubernetes.node_selector:
            spec["nodeSelector"] = config.kubernetes.node_selector
        if group.gpus:
            spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists"}]
    else:
        ports["serve"] = config.ingress.port
        if config.ingress.grpc_port is not None:
            ports["grpc"] = config.ingress.grpc_port
        pod = _pod(config, group.name, group.size, ports, {})
        spec = pod["spec"]
        spec["terminationGracePeriodSeconds"] = config.ingress.longest_stream_s + 60
        drain = ["bash", "-c", drain_script(ports["serve"], ports.get("grpc"))]
        spec["containers"][0]["lifecycle"] = {"preStop": {"exec": {"command": drain}}}
        spec["topologySpreadConstraints"] = [
            {
                "maxSkew": 1, "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": selector(config, INGRESS)},
            }
        ]  # fmt: skip
    spec["serviceAccountName"] = "rayseek"
    spec["automountServiceAccountToken"] = False
    return pod


def autoscaler_options() -> dict[str, Any]:
    """Of the container that KubeRay adds to the head pod; without a security context of its own
    the namespace would refuse the pod. It writes where the head does."""
    resources = {"cpu": "1", "memory": "2Gi"}
    return {
        "version": "v2",
        "idleTimeoutSeconds": IDLE_S,
        "env": [{"name": "HOME", "value": HOME}],
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "securityContext": dict(CONFINED),
        "volumeMounts": [
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "home", "mountPath": HOME},
        ],
    }


def drain_script(*ports: int | None, tables: str = "/proc/net/tcp*") -> str:
    """Wait until endpoints have forgotten the pod, and then until no client is connected."""
    served = "|".join(f"{port:04X}" for port in ports if port is not None)
    return (
        "sleep 15; while grep -qE "
        f"'^ *[0-9]+: [0-9A-F]+:({served}) [0-9A-F]+:[0-9A-F]+ 01 ' {tables}; do sleep 2; done"
    )


def environment(config: Config) -> dict[str, str]:
    """Of every Ray container."""
    return {
        **cluster_environment(config),
        "HOME": HOME,
        "XDG_CACHE_HOME": "/cache",
        "TRITON_CACHE_DIR": "/cache/triton",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def _fabric_environment(fabric: FabricSettings) -> dict[str, str]:
    meeting = {
        "NCCL_SOCKET_IFNAME": fabric.interface, "GLOO_SOCKET_IFNAME": fabric.interface,
    }  # fmt: skip
    if fabric.kind == "none":
        return meeting
    roce = {"NCCL_IB_GID_INDEX": str(fabric.gid_index)} if fabric.kind == "roce" else {}
    return {**meeting, "NCCL_IB_HCA": fabric.devices, "NCCL_IB_TIMEOUT": "22", **roce}


def _devices(config: Config, group: Group) -> dict[str, str]:
    if not group.gpus:
        return {}
    rdma = (
        {} if config.kubernetes.fabric.kind == "none" else {config.kubernetes.fabric.resource: "1"}
    )
    return {"nvidia.com/gpu": str(group.gpus), **rdma}


def shm_gib(size: PodSize) -> float:
    return min(MAX_SHM_GIB, size.memory_gib / SHM_PART)


def object_store_bytes(size: PodSize) -> int:
    return int(shm_gib(size) / STORE_PART * 2**30)


def gib(amount: float) -> str:
    """A Kubernetes quantity."""
    return f"{amount:g}Gi" if amount == int(amount) else f"{round(amount * 1024)}Mi"


def _pod(
    config: Config, component: str, size: PodSize, ports: dict[str, int], devices: dict[str, str]
) -> dict[str, Any]:
    cell = config.kubernetes
    cpus = f"{size.cpus:g}" if size.cpus == int(size.cpus) else f"{round(size.cpus * 1000)}m"
    resources = {"cpu": cpus, "memory": gib(size.memory_gib), **devices}
    if config.hardware.accelerator != "cpu":
        resources["ephemeral-storage"] = "64Gi"
    env = environment(config) | (_fabric_environment(cell.fabric) if devices else {})
    written = {"tmp": "/tmp", "home": HOME, "cache": "/cache"}
    mounts: list[dict[str, Any]] = [
        *({"name": name, "mountPath": path} for name, path in written.items()),
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    volumes: list[dict[str, Any]] = [
        *({"name": name, "emptyDir": {}} for name in written),
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": gib(shm_gib(size))}},
    ]
    if config.api.key_file is not None:
        mounts.append(
            {"name": "keys", "mountPath": str(config.api.key_file.parent), "readOnly": True}
        )
        volumes.append(
            {"name": "keys", "secret": {"secretName": "rayseek-keys", "defaultMode": 0o440}}
        )
    folder, claim = cell.weights.node_path, cell.weights.claim
    source: dict[str, Any] | None = None
    if folder is not None and component not in ("head", INGRESS):
        source = {"hostPath": {"path": folder, "type": "Directory"}}
    elif folder is not None or claim is not None:
        source = {"persistentVolumeClaim": {"claimName": claim or CLAIM, "readOnly": True}}
    if source is not None and config.model.path is not None:
        mounts.append(
            {"name": "models", "mountPath": str(config.model.path.parent), "readOnly": True}
        )
        volumes.append({"name": "models", **source})
    container = {
        "name": "ray",
        "image": cell.image,
        "securityContext": dict(CONFINED),
        "env": [{"name": name, "value": value} for name, value in env.items()],
        "ports": [{"name": name, "containerPort": port} for name, port in ports.items()],
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "volumeMounts": mounts,
    }
    return {
        "metadata": {"labels": labels(config, component)},
        "spec": {
            "priorityClassName": "rayseek",
            "securityContext": {
                "runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER,
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [container],
            "volumes": volumes,
        },
    }  # fmt: skip
