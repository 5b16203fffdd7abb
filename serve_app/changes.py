"""Changes of a running application by its Serve config file, made as `serve deploy` and KubeRay do.

A rolling update of one deployment: an option of its replicas changes by nothing that matters, so
that Serve replaces them. Another number of replicas. An update of all: an argument of the
application changes. Each is over when the application is healthy and nothing old is left.
"""

from __future__ import annotations

import copy
import itertools
import json
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeAlias

from rayseek.cluster.autoscaling import replica_ranges, serve_scaling
from rayseek.cluster.config import Config
from rayseek.cluster.layout import layout
from rayseek.model.official import DEEPSEEK_V3
from rayseek.serve_app.local import StartError

APPLICATIONS = "/api/serve/applications/"
LOOK_S = 0.5
GRAIN = 0.0001  # the least part of a CPU that Ray tells apart
File: TypeAlias = Mapping[str, Any]


class ServeApi:
    """The dashboard's REST API, which deploys Serve config files and tells what became of them."""

    def __init__(self, dashboard: str, token: str) -> None:
        self._url = f"{dashboard}{APPLICATIONS}"
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}

    def deploy(self, file: File) -> None:
        """Returns when it is accepted. Raises StartError if it is not."""
        self._ask("PUT", json.dumps(file).encode())

    def application(self) -> dict[str, Any]:
        """What Serve says of the only one; {} before there is one."""
        found = json.loads(self._ask("GET", None))["applications"]
        return next(iter(found.values()), {})

    def replicas(self) -> dict[str, dict[str, str]]:
        """State of each replica, by deployment and id."""
        return {
            name: {r["replica_id"]: r["state"] for r in deployment["replicas"]}
            for name, deployment in self.application().get("deployments", {}).items()
        }

    def settle(
        self, timeout_s: float, gone: Collection[str] = (), counts: Mapping[str, int] | None = None
    ) -> None:
        """Until all is healthy, the replicas `gone` are, and deployments have these numbers.

        Raises StartError if the application fails, or all of this takes longer.
        """
        deadline, application = time.monotonic() + timeout_s, {}
        while time.monotonic() < deadline:
            application = self.application()
            if settled(application, gone, counts or {}):
                return
            if application.get("status") == "DEPLOY_FAILED":
                raise StartError(f"the application failed: {application['message']}")
            time.sleep(LOOK_S)
        raise StartError(f"not settled within {timeout_s:.0f} s: {_summary(application)}")

    def _ask(self, method: str, body: bytes | None) -> bytes:
        request = urllib.request.Request(self._url, body, self._headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                found: bytes = answer.read()
                return found
        except urllib.error.HTTPError as error:
            raise StartError(f"{method} {self._url}: {error.read().decode()[:500]}") from None


def settled(
    application: Mapping[str, Any], gone: Collection[str], counts: Mapping[str, int]
) -> bool:
    """Whether all is healthy, the replicas `gone` are, and deployments have these numbers."""
    deployments = application.get("deployments", {})
    if application.get("status") != "RUNNING" or not deployments:
        return False
    for name, deployment in deployments.items():
        replicas = deployment["replicas"]
        if deployment["status"] != "HEALTHY" or any(r["state"] != "RUNNING" for r in replicas):
            return False
        if len(replicas) != counts.get(name, len(replicas)):
            return False
        if any(r["replica_id"] in gone for r in replicas):
            return False
    return True


def _summary(application: Mapping[str, Any]) -> str:
    parts = [
        f"{name} {d['status']} {[r['state'] for r in d['replicas']]} {d['message']}"
        for name, d in application.get("deployments", {}).items()
    ]
    return "; ".join([str(application.get("status")), *parts])


class Changes:
    """Makes one change after the other, in a fixed order, and waits for each.

    file: of the running application, made from `config`, with all changes so far.
    """

    def __init__(self, api: ServeApi, config: Config, file: File) -> None:
        self._api = api
        self.file: File = file
        deployments = layout(config, DEEPSEEK_V3).deployments  # the same for a smaller model
        self._cpus = {d.name: d.replica_cpus for d in deployments}
        self._ranges = replica_ranges(config)
        counts = {d.name: (d.replicas, d.replicas + 1) for d in deployments if d.name != "Ingress"}
        self._counts = {n: self._ranges.get(n, c) for n, c in counts.items() if n != "Decode"}
        self._updates, self._scalings = self._all_updates(), self._all_scalings()

    def update(self, timeout_s: float) -> str:
        """Replace the replicas of the next deployment, or of all; which it was."""
        name, file = next(self._updates)
        replicas = self._api.replicas()
        old = [r for n, of in replicas.items() if name in (n, "everything") for r in of]
        self._api.deploy(file)
        self._api.settle(timeout_s, gone=old)
        return f"update {name}"

    def scale(self, timeout_s: float) -> str:
        """Give the next deployment more or fewer replicas; which, and how many."""
        name, count, file = next(self._scalings)
        self._api.deploy(file)
        self._api.settle(timeout_s, counts={name: count})
        return f"scale {name} to {count}"

    def _all_updates(self) -> Iterator[tuple[str, File]]:
        for number in itertools.count(1):
            for name, cpus in self._cpus.items():
                self.file = replaced(self.file, name, cpus + number * GRAIN)
                yield name, self.file
            self.file = reconfigured(self.file, number)
            yield "everything", self.file

    def _all_scalings(self) -> Iterator[tuple[str, int, File]]:
        for turn in itertools.cycle((1, 0)):  # up, then down
            for name, counts in self._counts.items():
                self.file = counted(self.file, name, counts[turn], name in self._ranges)
                yield name, counts[turn], self.file


def replaced(file: File, deployment: str, cpus: float) -> File:
    """A file whose replicas of this deployment have so many CPUs."""
    changed, entry = _entry(file, deployment)
    entry["ray_actor_options"] = {"num_cpus": round(cpus, 4)}
    return changed


def counted(file: File, deployment: str, replicas: int, scales: bool) -> File:
    """A file with so many replicas of this deployment. scales: by a policy, which it binds."""
    changed, entry = _entry(file, deployment)
    if scales:
        entry["autoscaling_config"] = serve_scaling((replicas, replicas), replicas)
    else:
        entry["num_replicas"] = replicas
    return changed


def reconfigured(file: File, number: int) -> File:
    """A file with another argument, which matters to nobody."""
    changed = copy.deepcopy(dict(file))
    changed["applications"][0]["args"].setdefault("engine", {})["load_timeout_s"] = 1800 + number
    return changed


def _entry(file: File, deployment: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A copy, and what it says of the deployment."""
    changed = copy.deepcopy(dict(file))
    entries = changed["applications"][0].setdefault("deployments", [])
    for entry in entries:
        if entry["name"] == deployment:
            return changed, entry
    entries.append({"name": deployment})
    return changed, entries[-1]
