"""Which pods a config needs: KubeRay's worker groups, worked out from the layout.

A group has the name of its Serve deployment in lower case, and its pods the Ray label `role` with
that name, by which Serve's bundles find them. Units of several nodes: a prefill unit is a replica
of `numOfHosts` pods, so that it comes and goes whole; a decode unit's nodes are replicas of their
own, so that a failed one is replaced alone while the others keep what they have loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

from rayseek.cluster.cell import PodSize
from rayseek.cluster.config import Config
from rayseek.cluster.layout import Deployment, Layout

INGRESS = "ingress"


@dataclass(frozen=True, slots=True)
class Group:
    """One worker group. hosts: pods of a replica (`numOfHosts`). gpus: of a pod."""

    name: str
    replicas: int
    hosts: int
    gpus: int
    size: PodSize

    @property
    def pods(self) -> int:
        return self.replicas * self.hosts


def groups(config: Config, plan: Layout) -> list[Group]:
    """The ingress group first, then one for each deployment with ranks."""
    cell = config.kubernetes
    found = [Group(INGRESS, cell.ingress_pods, 1, 0, cell.ingress)]
    for deployment in plan.deployments:
        if deployment.bundles:
            found.append(_group(config, deployment))
    return found


def _group(config: Config, deployment: Deployment) -> Group:
    per_node = config.hardware.ranks_per_node
    nodes = len(deployment.bundles)
    gpus = per_node if per_node and deployment.rank_gpus else 0
    name = deployment.name.lower()
    if per_node is None:  # a pod takes any number of CPU ranks
        return Group(name, 1, 1, 0, config.kubernetes.worker)
    if nodes > 1:
        hosts = nodes if name == "prefill" else 1
        return Group(
            name, deployment.replicas * nodes // hosts, hosts, gpus, config.kubernetes.worker
        )
    ranks = len(deployment.places) // deployment.replicas
    return Group(
        name, -(-deployment.replicas // (per_node // ranks)), 1, gpus, config.kubernetes.worker
    )
