"""Parsed manifests as the rules see them: objects, cells, and the pods of a cell."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import yaml
from pydantic import ValidationError

from rayseek.cluster.config import Config
from rayseek.serve_app.k8s.yaml_text import read

_UNITS = {"": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15,
          "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50}  # fmt: skip


def quantity(value: object) -> float:
    """500m, 16Gi, 8 as a number; NaN for what is none."""
    found = re.fullmatch(r"([0-9.]+)(m|k|[MGTP]|[KMGTP]i)?", str(value))
    return float(found[1]) * _UNITS[found[2] or ""] if found else math.nan


def name_of(document: Mapping[str, Any]) -> str:
    """Kind/name, for messages."""
    return f"{document.get('kind')}/{document.get('metadata', {}).get('name')}"


@dataclass(frozen=True)
class Pod:
    """The pods of one group, or the head. `lowest`, `highest`: how many KubeRay may make."""

    name: str
    group: Mapping[str, Any]
    lowest: int
    highest: int

    @property
    def spec(self) -> Mapping[str, Any]:
        spec: Mapping[str, Any] = self.group["template"]["spec"]
        return spec

    @property
    def labels(self) -> Mapping[str, str]:
        found: Mapping[str, str] = self.group["template"].get("metadata", {}).get("labels", {})
        return found

    @property
    def container(self) -> Mapping[str, Any]:
        """Ray's: the first."""
        first: Mapping[str, Any] = self.spec["containers"][0]
        return first

    @property
    def ports(self) -> dict[str, int]:
        return {p.get("name", ""): p["containerPort"] for p in self.container.get("ports", [])}

    @property
    def environment(self) -> dict[str, str | None]:
        return {e["name"]: e.get("value") for e in self.container.get("env", [])}

    @property
    def limits(self) -> Mapping[str, Any]:
        limits: Mapping[str, Any] = self.container.get("resources", {}).get("limits", {})
        return limits

    @property
    def resources(self) -> dict[str, float]:
        """What Ray has on such a pod, as KubeRay passes it to `ray start`."""
        given = self.group.get("rayStartParams", {})
        cpus = quantity(given.get("num-cpus", self.limits.get("cpu", 0)))
        gpus = quantity(given.get("num-gpus", self.limits.get("nvidia.com/gpu", 0)))
        return {"CPU": float(math.ceil(cpus)), "GPU": gpus}

    @property
    def ray_labels(self) -> Mapping[str, str]:
        found: Mapping[str, str] = self.group.get("labels", {})
        return found

    @property
    def hosts(self) -> int:
        return int(self.group.get("numOfHosts", 1))


class Cell:
    """A RayService."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.document = document
        self.name = name_of(document)
        self.metadata: Mapping[str, Any] = document["metadata"]
        self.spec: Mapping[str, Any] = document["spec"]
        self.cluster: Mapping[str, Any] = self.spec.get("rayClusterConfig", {})

    @cached_property
    def groups(self) -> list[Pod]:
        return [
            Pod(g["groupName"], g, g["minReplicas"] * hosts, g["maxReplicas"] * hosts)
            for g in self.cluster.get("workerGroupSpecs", [])
            for hosts in [g.get("numOfHosts", 1)]
        ]

    @cached_property
    def pods(self) -> list[Pod]:
        head = self.cluster.get("headGroupSpec")
        return [*([Pod("head", head, 1, 1)] if head else []), *self.groups]

    @cached_property
    def serve(self) -> dict[str, Any] | None:
        """The Serve config; None if it is no mapping."""
        try:
            (found,) = read(self.spec.get("serveConfigV2", ""))
        except (yaml.YAMLError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    @property
    def applications(self) -> list[dict[str, Any]]:
        """[] if the Serve config has another form, which a rule of its own says."""
        listed = (self.serve or {}).get("applications")
        return [a for a in listed if isinstance(a, dict)] if isinstance(listed, list) else []

    @property
    def deployments(self) -> list[dict[str, Any]]:
        found = [d for a in self.applications for d in a.get("deployments") or []]
        return [d for d in found if isinstance(d, dict)]

    @cached_property
    def config(self) -> Config | None:
        """What the application is told; None if it is not valid."""
        try:
            return Config.model_validate(self.applications[0]["args"])
        except (IndexError, KeyError, ValidationError):
            return None


class Manifests:
    """All objects that are checked together."""

    def __init__(self, documents: list[dict[str, Any]], released: list[dict[str, Any]]) -> None:
        self.documents = documents
        self.cells = [Cell(d) for d in documents if d["kind"] == "RayService"]
        self.released = {c.name: c for c in map(Cell, released)}

    def of(self, *kinds: str) -> list[dict[str, Any]]:
        return [d for d in self.documents if d["kind"] in kinds]

    @cached_property
    def pods(self) -> list[Pod]:
        """Of cells, and of the sets and jobs beside them."""
        others = [
            Pod(name_of(d), d["spec"], 1, 1) for d in self.of("StatefulSet", "DaemonSet", "Job")
        ]
        return [pod for cell in self.cells for pod in cell.pods] + others

    def in_cells(self, heads: bool = True) -> Iterator[tuple[str, Cell, Pod]]:
        """Where, cell and pods of each group, and of the head if `heads`."""
        for cell in self.cells:
            for pod in cell.pods if heads else cell.groups:
                yield f"{cell.name} {pod.name}", cell, pod

    def deployments(self) -> Iterator[tuple[str, Cell, dict[str, Any]]]:
        """Where, cell and what it says of a Serve deployment."""
        for cell in self.cells:
            for deployment in cell.deployments:
                yield f"{cell.name} {deployment.get('name')}", cell, deployment

    def selected(self, selector: Mapping[str, Any]) -> list[Pod]:
        """The pods whose labels fit a selector's matchLabels."""
        wanted = selector.get("matchLabels", {}).items()
        return [pod for pod in self.pods if wanted <= pod.labels.items()]


Finding: TypeAlias = tuple[str, str]  # where, what
Rule: TypeAlias = Callable[[Manifests], Iterator[Finding]]
RULES: dict[str, Rule] = {}


def rule(function: Rule) -> Rule:
    """Enter a rule under its function's name. Rules see only objects that fit their schemas."""
    RULES[function.__name__.replace("_", "-")] = function
    return function
