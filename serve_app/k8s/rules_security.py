"""What no pod may do, and what no manifest may hold."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from rayseek.serve_app.k8s.manifests import Finding, Manifests, name_of, quantity, rule

SECRET = re.compile(r"(PASSWORD|TOKEN|SECRET|API_KEY|CREDENTIAL)S?$")
SHARED = ("hostNetwork", "hostPID", "hostIPC")
WRITTEN = ("/tmp", "/dev/shm")


def _containers(all_: Manifests) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(where, pod spec, container), init containers and KubeRay's autoscaler too."""
    for pod in all_.pods:
        for container in [*pod.spec.get("initContainers", []), *pod.spec["containers"]]:
            yield f"{pod.name} {container['name']}", dict(pod.spec), container
    for cell in all_.cells:
        if cell.cluster.get("enableInTreeAutoscaling"):
            head, options = cell.pods[0], cell.cluster.get("autoscalerOptions", {})
            added = {"image": head.container["image"], **options}
            yield "head autoscaler", dict(head.spec), added


@rule
def no_root(all_: Manifests) -> Iterator[Finding]:
    for where, spec, container in _containers(all_):
        user = {**spec.get("securityContext", {}), **container.get("securityContext", {})}
        if user.get("runAsNonRoot") is not True or user.get("runAsUser", 0) == 0:
            yield where, "runAsNonRoot: true and a runAsUser other than 0"


@rule
def no_escalation(all_: Manifests) -> Iterator[Finding]:
    for where, _, container in _containers(all_):
        context = container.get("securityContext", {})
        if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
            yield where, "allowPrivilegeEscalation: false, and not privileged"


@rule
def read_only_root(all_: Manifests) -> Iterator[Finding]:
    for where, _, container in _containers(all_):
        if container.get("securityContext", {}).get("readOnlyRootFilesystem") is not True:
            yield where, "readOnlyRootFilesystem: true"
    for where, _, pod in all_.in_cells():
        mounts = {m["mountPath"]: m for m in pod.container.get("volumeMounts", [])}
        home = pod.environment.get("HOME") or "HOME"
        for path in (*WRITTEN, home):
            if path not in mounts or mounts[path].get("readOnly"):
                yield where, f"Ray writes to {path}: give it a volume"


@rule
def no_capabilities(all_: Manifests) -> Iterator[Finding]:
    for where, _, container in _containers(all_):
        given = container.get("securityContext", {}).get("capabilities", {})
        if given.get("drop") != ["ALL"] or given.get("add"):
            yield where, "capabilities: drop ALL, add none"


@rule
def seccomp(all_: Manifests) -> Iterator[Finding]:
    for where, spec, container in _containers(all_):
        context = {**spec.get("securityContext", {}), **container.get("securityContext", {})}
        if context.get("seccompProfile", {}).get("type") not in {"RuntimeDefault", "Localhost"}:
            yield where, "seccompProfile: RuntimeDefault"


@rule
def own_namespaces(all_: Manifests) -> Iterator[Finding]:
    for pod in all_.pods:
        for name in SHARED:
            if pod.spec.get(name):
                yield pod.name, f"{name}: network policies and isolation end there"


@rule
def no_account_token(all_: Manifests) -> Iterator[Finding]:
    for pod in all_.pods:
        if pod.name == "head":
            if "serviceAccountName" in pod.spec:
                yield pod.name, "serviceAccountName: KubeRay makes the head's own"
        elif pod.spec.get("automountServiceAccountToken") is not False:
            yield pod.name, "automountServiceAccountToken: false"


@rule
def node_folder(all_: Manifests) -> Iterator[Finding]:
    for where, _, pod in all_.in_cells():
        shared = {v["name"] for v in pod.spec.get("volumes", []) if "hostPath" in v}
        for mount in pod.container.get("volumeMounts", []):
            if mount["name"] in shared and not mount.get("readOnly"):
                yield where, f"the node's folder {mount['name']}: readOnly"


@rule
def pinned_image(all_: Manifests) -> Iterator[Finding]:
    for where, _, container in _containers(all_):
        name, _, digest = container.get("image", "").partition("@")
        tag = name.rpartition("/")[2].partition(":")[2]
        if not digest and tag in {"", "latest"}:
            yield where, f"image {container.get('image')!r}: a tag other than latest, or a digest"


@rule
def secret_in_clear(all_: Manifests) -> Iterator[Finding]:
    for document in all_.of("Secret"):
        if document.get("data") or document.get("stringData"):
            what = "a secret in a file: kubectl create secret, or External Secrets"
            yield name_of(document), what
    for where, _, container in _containers(all_):
        for entry in container.get("env", []):
            if SECRET.search(entry["name"]) and "value" in entry:
                yield where, f"{entry['name']} in clear: valueFrom a Secret"
    for cell in all_.cells:
        if cell.config is not None and cell.config.api.keys:
            yield cell.name, "api.keys in clear: api.key_file, from a Secret"
        password = cell.cluster.get("gcsFaultToleranceOptions", {}).get("redisPassword", {})
        if "value" in password:
            yield cell.name, "redisPassword in clear: valueFrom a Secret"


@rule
def resources(all_: Manifests) -> Iterator[Finding]:
    for where, _, container in _containers(all_):
        given = container.get("resources", {})
        requests, limits = given.get("requests", {}), given.get("limits", {})
        for name in ("cpu", "memory"):
            if quantity(requests.get(name)) != quantity(limits.get(name)):
                yield where, f"{name}: give a request and the same limit"
