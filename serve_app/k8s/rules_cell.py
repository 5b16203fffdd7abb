"""Whether the parts of a cell fit each other: bundles and pods, versions, ports, bytes."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import PurePosixPath
from typing import Any

from rayseek.cluster.autoscaling import replica_ranges
from rayseek.cluster.fit import GIB, problems, rank_memories
from rayseek.cluster.layout import UNIT_NAMES
from rayseek.model.official import DEEPSEEK_V3
from rayseek.serve_app.k8s.groups import INGRESS
from rayseek.serve_app.k8s.manifests import Cell, Finding, Manifests, Pod, quantity, rule
from rayseek.serve_app.k8s.pods import AGENT_PORT
from rayseek.serve_app.local import cluster_environment

IMAGE_FOLDER = PurePosixPath("/opt/rayseek")  # what the image itself holds


def _wanted(deployment: dict[str, Any]) -> list[tuple[dict[str, float], dict[str, str]]]:
    """(resources, label selector) of each bundle; of the replica where there are none."""
    bundles = deployment.get("placement_group_bundles")
    options = deployment.get("ray_actor_options") or {}
    if not bundles:
        own = {"CPU": options.get("num_cpus", 1), "GPU": options.get("num_gpus", 0)}
        return [(own, options.get("label_selector") or {})]
    selectors = deployment.get("placement_group_bundle_label_selector") or [{}]
    if len(selectors) == 1:
        selectors = selectors * len(bundles)
    return list(zip(bundles, selectors, strict=True))


def _matching(cell: Cell, selector: dict[str, str]) -> list[Pod]:
    return [pod for pod in cell.pods if selector.items() <= pod.ray_labels.items()]


def _fitting(bundle: dict[str, float], pods: list[Pod]) -> list[Pod]:
    return [p for p in pods if all(p.resources.get(k, 0) >= v for k, v in bundle.items())]


@rule
def bundle_label(all_: Manifests) -> Iterator[Finding]:
    for where, cell, deployment in all_.deployments():
        for _, selector in _wanted(deployment):
            if not selector:
                yield where, "no label selector"
            elif not _matching(cell, selector):
                yield where, f"no group has the labels {selector}"
            else:
                continue
            break


@rule
def bundle_fits(all_: Manifests) -> Iterator[Finding]:
    for where, cell, deployment in all_.deployments():
        for bundle, selector in _wanted(deployment):
            pods = _matching(cell, selector)
            if pods and not _fitting(bundle, pods):
                have = "; ".join(f"{p.name} {p.resources}" for p in pods)
                yield where, f"{bundle} fits no pod of {have}"
                break


@rule
def enough_pods(all_: Manifests) -> Iterator[Finding]:
    """Bundles of one deployment beside others of its group, first fit in order of size."""
    for cell in all_.cells:
        for pod in cell.groups:
            rooms = [dict(pod.resources) for _ in range(pod.highest)]
            for deployment in cell.deployments:
                wanted = _wanted(deployment)
                if not all(s and s.items() <= pod.ray_labels.items() for _, s in wanted):
                    continue
                if not all(_fitting(bundle, [pod]) for bundle, _ in wanted):
                    continue
                spread = deployment.get("placement_group_strategy") == "STRICT_SPREAD"
                per_node = deployment.get("max_replicas_per_node") or len(rooms) * 10**6
                placed = _place(
                    rooms, [b for b, _ in wanted], _most_replicas(deployment), spread, per_node
                )
                if placed is not None:
                    yield (
                        f"{cell.name} {deployment['name']}",
                        f"{pod.highest} pods of {pod.name} have room for {placed} replicas only",
                    )


def _most_replicas(deployment: dict[str, Any]) -> int:
    scaling = deployment.get("autoscaling_config") or {}
    return int(scaling.get("max_replicas") or deployment.get("num_replicas") or 1)


def _place(
    rooms: list[dict[str, float]],
    bundles: list[dict[str, float]],
    replicas: int,
    spread: bool,
    per_node: int,
) -> int | None:
    """Take the room of all replicas; how many found it, or None if all did."""
    own = [0] * len(rooms)
    for replica in range(replicas):
        used: set[int] = set()
        for bundle in bundles:
            for index, room in enumerate(rooms):
                if (spread and index in used) or own[index] >= per_node:
                    continue
                if all(room.get(key, 0) >= value for key, value in bundle.items()):
                    used.add(index)
                    for key, value in bundle.items():
                        room[key] -= value
                    break
            else:
                return replica
        for index in used:
            own[index] += 1
    return None


@rule
def whole_units(all_: Manifests) -> Iterator[Finding]:
    """A demand smaller than a replica of `numOfHosts` pods would never be met by the autoscaler."""
    for where, cell, deployment in all_.deployments():
        wanted = _wanted(deployment)
        for pod in _matching(cell, wanted[0][1]) if wanted[0][1] else []:
            if len(wanted) % pod.hosts:
                yield where, f"{len(wanted)} bundles: not whole replicas of {pod.hosts} pods"


@rule
def ingress_spread(all_: Manifests) -> Iterator[Finding]:
    """Readiness asks each ingress pod for a proxy, which is only where an ingress replica is."""
    for where, cell, deployment in all_.deployments():
        pods = sum(p.highest for p in cell.groups if p.name == INGRESS)
        if deployment["name"] != "Ingress" or not pods:
            continue
        replicas = deployment.get("num_replicas") or 1
        most = deployment.get("max_replicas_per_node")
        if not most or replicas <= most * (pods - 1):
            yield where, f"{replicas} replicas, {most} on a pod, may leave one of {pods} idle"


@rule
def ray_version(all_: Manifests) -> Iterator[Finding]:
    ours = version("ray")
    for cell in all_.cells:
        told = cell.cluster.get("rayVersion")
        if told != ours:
            yield cell.name, f"rayVersion is {told}, but this Rayseek runs on Ray {ours}"
    for where, cell, pod in all_.in_cells():
        told = cell.cluster.get("rayVersion")
        if not pod.container["image"].partition("@")[0].endswith(f"-ray{told}"):
            yield where, f"the image's tag does not end in -ray{told}"


@rule
def one_image(all_: Manifests) -> Iterator[Finding]:
    for cell in all_.cells:
        images = {pod.container["image"] for pod in cell.pods}
        if len(images) > 1:
            yield cell.name, f"its pods run {len(images)} images: {', '.join(sorted(images))}"


@rule
def head_runs_nothing(all_: Manifests) -> Iterator[Finding]:
    for cell in all_.cells:
        head = cell.cluster.get("headGroupSpec", {}).get("rayStartParams", {})
        for name in ("num-cpus", "num-gpus"):
            if (told := head.get(name)) != "0":
                yield cell.name, f"the head's {name} is {told!r}: '0' keeps replicas off it"
        if not cell.spec.get("excludeHeadPodFromServeSvc"):
            yield cell.name, "excludeHeadPodFromServeSvc: true, since no ingress runs there"


@rule
def unit_readiness(all_: Manifests) -> Iterator[Finding]:
    """KubeRay's own probe asks for a Serve proxy, so a pod of a unit would never be Ready."""
    for where, _, pod in all_.in_cells(heads=False):
        probe = pod.container.get("readinessProbe", {}).get("httpGet", {})
        asked = probe.get("path"), probe.get("port")
        if pod.name != INGRESS and asked != ("/api/healthz", AGENT_PORT):
            yield where, f"readiness must be /api/healthz on {AGENT_PORT}"


@rule
def environment(all_: Manifests) -> Iterator[Finding]:
    for cell in all_.cells:
        proxies = sum(pod.lowest for pod in cell.groups if pod.name == INGRESS)
        wanted = cluster_environment(cell.config, proxies) if cell.config else {}
        for pod in cell.pods:
            for name, value in wanted.items():
                if pod.environment.get(name) != value:
                    yield f"{cell.name} {pod.name}", f"the environment needs {name}={value}"


@rule
def grace(all_: Manifests) -> Iterator[Finding]:
    for where, cell, pod in all_.in_cells(heads=False):
        longest = cell.config.ingress.longest_stream_s if cell.config else 0
        least = longest if pod.name == INGRESS else 60
        given = pod.spec.get("terminationGracePeriodSeconds", 30)
        if given < least:
            yield where, f"terminationGracePeriodSeconds {given} cuts streams: {least} or more"


@rule
def http_port(all_: Manifests) -> Iterator[Finding]:
    for where, cell, pod in all_.in_cells():
        told = ((cell.serve or {}).get("http_options") or {}).get("port", 8000)
        if pod.ports.get("serve", told) != told:
            yield where, f"its port serve is {pod.ports['serve']}, but Serve listens on {told}"


@rule
def device_memory(all_: Manifests) -> Iterator[Finding]:
    """The ledger's arithmetic for DeepSeek-V3; a CPU cell has a smaller model and no such limit."""
    for cell in all_.cells:
        config = cell.config
        if config is not None and config.hardware.rank_gib is not None:
            for sentence in problems(config, DEEPSEEK_V3):
                yield cell.name, sentence


@rule
def devices(all_: Manifests) -> Iterator[Finding]:
    for where, cell, pod in all_.in_cells(heads=False):
        if cell.config is None:
            continue
        hardware, gpus = cell.config.hardware, int(pod.resources["GPU"])
        bare = hardware.accelerator == "cpu" or pod.name == INGRESS
        wanted = 0 if bare else hardware.ranks_per_node or 0
        if gpus != wanted:
            yield where, f"{gpus} GPUs, but the config has {wanted} on a node"


@rule
def host_memory(all_: Manifests) -> Iterator[Finding]:
    for where, _, pod in all_.in_cells():
        limit = quantity(pod.limits.get("memory", 0))
        shm = [v["emptyDir"] for v in pod.spec.get("volumes", []) if v["name"] == "shm"]
        if not shm or quantity(shm[0].get("sizeLimit")) > limit / 2:
            yield where, "a volume shm for /dev/shm, of at most half the memory limit"
        store = quantity(pod.group.get("rayStartParams", {}).get("object-store-memory"))
        if shm and not store <= quantity(shm[0].get("sizeLimit")):
            yield where, "object-store-memory must be set, and fit into /dev/shm"


@rule
def pinned_memory(all_: Manifests) -> Iterator[Finding]:
    """Ranks on a CPU hold their pages in the pod's memory."""
    for cell in all_.cells:
        config = cell.config
        if config is None or config.hardware.accelerator != "cpu":
            continue
        ranges = replica_ranges(config)
        pages = {m.of: m.parts.get("KV pages", 0) for m in rank_memories(config, DEEPSEEK_V3)}
        for pod in cell.groups:
            for role, unit in config.units.items():
                _, units = ranges.get(UNIT_NAMES[role], (0, unit.units))
                needs = pages[role] * units * unit.attention_ranks
                if (
                    pod.name == role
                    and quantity(pod.limits.get("memory", 0)) * pod.highest <= needs
                ):
                    yield f"{cell.name} {pod.name}", f"KV pages alone are {needs / GIB:.1f} GiB"


@rule
def reachable_files(all_: Manifests) -> Iterator[Finding]:
    for where, cell, pod in all_.in_cells():
        if cell.config is None:
            continue
        files = {"model.path": cell.config.model.path, "api.key_file": cell.config.api.key_file}
        mounted = [PurePosixPath(m["mountPath"]) for m in pod.container.get("volumeMounts", [])]
        for name, path in files.items():
            if path and not {IMAGE_FOLDER, *mounted} & set(PurePosixPath(path).parents):
                yield where, f"{name} {path} is on no volume of this pod"
