"""Whether services, budgets, policies and routes fit the pods that they are for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rayseek.serve_app.k8s.groups import INGRESS
from rayseek.serve_app.k8s.manifests import Finding, Manifests, name_of, rule
from rayseek.serve_app.k8s.pods import AGENT_PORT, DASHBOARD_PORT

OPERATOR = {"kubernetes.io/metadata.name": "kuberay-operator"}


def _selector(document: dict[str, Any]) -> dict[str, Any]:
    """As matchLabels, of a Service, a budget or a policy."""
    spec = document["spec"]
    if document["kind"] == "Service":
        return {"matchLabels": spec.get("selector", {})}
    found: dict[str, Any] = spec.get("podSelector" if "podSelector" in spec else "selector", {})
    return found


@rule
def selects_pods(all_: Manifests) -> Iterator[Finding]:
    for document in all_.of("Service", "PodDisruptionBudget", "NetworkPolicy"):
        selector = _selector(document)
        if all_.cells and selector.get("matchLabels") and not all_.selected(selector):
            yield name_of(document), f"selects no pod here: {selector['matchLabels']}"


@rule
def budget(all_: Manifests) -> Iterator[Finding]:
    for document in all_.of("PodDisruptionBudget"):
        least, pods = document["spec"].get("minAvailable"), all_.selected(_selector(document))
        where = name_of(document)
        if not isinstance(least, int):
            yield where, "give minAvailable as an integer: no percentage works for KubeRay's pods"
        elif pods and least > sum(pod.highest for pod in pods):
            yield where, f"minAvailable {least}, but at most {sum(p.highest for p in pods)} pods"
        elif pods and pods[0].name != INGRESS and least < sum(pod.lowest for pod in pods):
            yield where, f"minAvailable {least} lets a unit's pods be evicted"


@rule
def service_port(all_: Manifests) -> Iterator[Finding]:
    for document in all_.of("Service"):
        for pod in all_.selected(_selector(document)):
            for port in document["spec"].get("ports", []):
                target = port.get("targetPort", port["port"])
                if target not in {*pod.ports, *pod.ports.values()}:
                    yield name_of(document), f"{pod.name} pods have no port {target}"


@rule
def policy_port(all_: Manifests) -> Iterator[Finding]:
    for document in all_.of("NetworkPolicy"):
        pods = all_.selected(_selector(document))
        known = {number for pod in pods for number in pod.ports.values()}
        for entry in document["spec"].get("ingress", []):
            for port in entry.get("ports", []):
                if pods and port.get("port") not in known:
                    yield name_of(document), f"opens {port.get('port')}, which no such pod has"


@rule
def default_deny(all_: Manifests) -> Iterator[Finding]:
    policies = all_.of("NetworkPolicy")
    denies = [
        p for p in policies
        if not _selector(p).get("matchLabels")
        and set(p["spec"].get("policyTypes", [])) == {"Ingress", "Egress"}
        and not p["spec"].get("ingress") and not p["spec"].get("egress")
    ]  # fmt: skip
    if policies and all_.cells and all_.of("Namespace") and not denies:
        yield "NetworkPolicy", "no policy denies everything that the others do not open"


@rule
def operator_reaches_head(all_: Manifests) -> Iterator[Finding]:
    """It submits the Serve config over HTTP: without this, no application starts."""
    if not all_.of("Namespace") or not all_.of("NetworkPolicy"):
        return
    for where, _, pod in all_.in_cells():
        wanted = {AGENT_PORT} | ({DASHBOARD_PORT} if pod.name == "head" else set())
        opened = {
            port.get("port")
            for document in all_.of("NetworkPolicy")
            if _selector(document).get("matchLabels", {}).items() <= pod.labels.items()
            for entry in document["spec"].get("ingress", [])
            for peer in entry.get("from", [])
            if peer.get("namespaceSelector", {}).get("matchLabels") == OPERATOR
            for port in entry.get("ports", [])
        }
        if wanted - opened:
            yield where, f"the operator may not reach {sorted(wanted - opened)}"


@rule
def dashboard_is_private(all_: Manifests) -> Iterator[Finding]:
    for document in all_.of("Service"):
        if document["spec"].get("type", "ClusterIP") != "ClusterIP":
            yield name_of(document), "only a Gateway faces outside: type ClusterIP"
    for cell in all_.cells:
        head = cell.cluster.get("headGroupSpec", {})
        if head.get("serviceType", "ClusterIP") != "ClusterIP" or head.get("enableIngress"):
            yield cell.name, "its dashboard must not face outside: ClusterIP, no ingress"
    for document in all_.of("NetworkPolicy"):
        for entry in document["spec"].get("ingress", []):
            ports = {port.get("port") for port in entry.get("ports", [])}
            if not entry.get("from") and (not ports or DASHBOARD_PORT in ports):
                yield name_of(document), "opens the dashboard to everybody"


@rule
def gateway_tls(all_: Manifests) -> Iterator[Finding]:
    for document in all_.of("Gateway"):
        for listener in document["spec"].get("listeners", []):
            certificates = listener.get("tls", {}).get("certificateRefs")
            if listener.get("protocol") != "HTTPS" or not certificates:
                yield (
                    name_of(document),
                    f"listener {listener.get('name')}: HTTPS with a certificate",
                )


@rule
def route_backend(all_: Manifests) -> Iterator[Finding]:
    services = {
        (d["metadata"]["name"], port["port"])
        for d in all_.of("Service") for port in d["spec"].get("ports", [])
    }  # fmt: skip
    for document in all_.of("HTTPRoute"):
        for entry in document["spec"].get("rules", []):
            for backend in entry.get("backendRefs", []):
                wanted = backend.get("name"), backend.get("port")
                if services and wanted not in services:
                    yield name_of(document), f"no Service {wanted[0]}:{wanted[1]}"
