"""What Kubernetes gives a cell: pods, image, weights, fabric. The config's `kubernetes` section.

A cell is one RayService: head, ingress pods, and the pods of all units. Names and counts of ranks
stand in the config's other sections; here is what only a cluster of pods needs.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A branch of the config: frozen, and a key that is not known is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PodSize(Section):
    """Requests and limits of one pod's Ray container; they are equal."""

    cpus: float = Field(gt=0, multiple_of=0.1)
    memory_gib: float = Field(gt=0)


class WeightSource(Section):
    """Where pods find `model.path`: in the image, unless one of these is set."""

    claim: str | None = None  # a PersistentVolumeClaim that many nodes can read
    node_path: str | None = Field(default=None, pattern="^/")  # a folder on each node's NVMe

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.claim and self.node_path:
            raise ValueError("claim and node_path: the weights come from one of them")
        return self


class FabricSettings(Section):
    """The network between GPU nodes."""

    kind: Literal["none", "ib", "roce"] = "none"  # InfiniBand, or RDMA over Ethernet
    resource: str = "rdma/hca"  # what the nodes' device plugin calls a device
    devices: str = "mlx5"  # NCCL_IB_HCA: names, or their beginning
    interface: str = "eth0"  # where NCCL and gloo meet: the pod network's
    gid_index: int = Field(default=3, ge=0)  # RoCE v2's, with roce


class KubernetesSettings(Section):
    """How `rayseek k8s render` writes this config for KubeRay."""

    cell: str = Field(default="rayseek", pattern=r"^[a-z]([a-z0-9-]{0,45}[a-z0-9])?$")
    namespace: str = Field(default="rayseek", pattern=r"^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$")
    image: str = "ghcr.io/rayseek/rayseek:0.1.0-ray2.60.0"
    head: PodSize = PodSize(cpus=16, memory_gib=64)
    ingress: PodSize = PodSize(cpus=16, memory_gib=32)
    worker: PodSize = PodSize(cpus=96, memory_gib=1500)  # of a node's ranks
    ingress_pods: int = Field(default=2, ge=1)  # fixed: a change reloads the proxies
    node_selector: dict[str, str] = {}  # of worker pods
    weights: WeightSource = WeightSource()
    fabric: FabricSettings = FabricSettings()
    gcs: Literal["memory", "redis"] = "memory"  # redis: a new head finds the old one's state
    upgrade: Literal["None", "NewCluster"] = "None"  # KubeRay's; None: by a second cell
    start_minutes: int = Field(default=90, ge=1)  # until a cell that does not serve has failed
    components: tuple[Literal["gateway", "grafana", "kueue", "mtls"], ...] = ()  # of k8s/components
