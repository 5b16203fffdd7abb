"""Which pods a config needs: KubeRay's worker groups, worked out from the layout.

A group has the name of its Serve deployment in lower case, and its pods the Ray label `role` with
that name, by which Serve's bundles find them. Units of several nodes: a prefill unit is a replica
of `numOfHosts` pods, so that it comes and goes whole; a decode unit's nodes are replicas of their
own, so that a failed one is replaced alone while the others keep what they have loaded. A group
whose deployment scales has the pods of as few and of as many units as the config's ranges allow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rayseek.cluster.autoscaling import replica_ranges
from rayseek.cluster.cell import PodSize
from rayseek.cluster.config import Config
from rayseek.cluster.layout import Deployment, Layout

INGRESS = "ingress"


@dataclass(frozen=True, slots=True)
class Group:
    """One worker group. hosts: pods of a replica (`numOfHosts`). gpus: of a pod.

    least, most: replicas, as the load wants them; it starts with `replicas`.
    """

    name: str
    replicas: int
    least: int
    most: int
    hosts: int
    gpus: int
    size: PodSize

    @property
    def scales(self) -> bool:
        return self.least < self.most

    @property
    def most_pods(self) -> int:
        return self.most * self.hosts


def groups(config: Config, plan: Layout) -> list[Group]:
    """The ingress group first, then one for each deployment with ranks."""
    cell, ranges = config.kubernetes, replica_ranges(config)
    pods = cell.ingress_pods
    found = [Group(INGRESS, pods, pods, pods, 1, 0, cell.ingress)]
    for deployment in plan.deployments:
        if deployment.bundles:
            found.append(_group(config, deployment, ranges.get(deployment.name)))
    return found


def _group(config: Config, deployment: Deployment, scales: tuple[int, int] | None) -> Group:
    """scales: the fewest and the most replicas of the deployment."""
    per_node, size = config.hardware.ranks_per_node, config.kubernetes.worker
    nodes = len(deployment.bundles)
    gpus = per_node if per_node and deployment.rank_gpus else 0
    name = deployment.name.lower()
    hosts = nodes if name == "prefill" else 1
    pods_of_unit = nodes // hosts if nodes > 1 else 1
    if per_node is None:  # as many CPU ranks as the pod has CPUs for
        own = sum(bundle["CPU"] for bundle in deployment.bundles)
        units_of_pod = max(1, int(math.ceil(size.cpus) / own))
    else:
        units_of_pod = max(1, per_node // (len(deployment.places) // deployment.replicas))

    def replicas(units: int) -> int:
        return -(-units * pods_of_unit // units_of_pod)

    least, most = scales or (deployment.replicas, deployment.replicas)
    return Group(
        name, replicas(deployment.replicas), replicas(least), replicas(most), hosts, gpus, size
    )
