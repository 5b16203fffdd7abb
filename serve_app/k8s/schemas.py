"""What a manifest may contain: strict JSON schemas of the kinds that Rayseek's manifests use.

`schemas.json.gz` holds one schema for each kind, where every field that is not named is refused.
`strict` makes the one of RayService from KubeRay's CRD; the built-in kinds' are the strict ones of
kubernetes-json-schema (Kubernetes 1.37), cut down to what is reachable.
"""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

FILE = Path(__file__).parent / "schemas.json.gz"
OTHERS = {  # kinds of other projects, which their own servers check
    "gateway.networking.k8s.io/v1/Gateway", "gateway.networking.k8s.io/v1/HTTPRoute",
    "monitoring.coreos.com/v1/PodMonitor", "monitoring.coreos.com/v1/PrometheusRule",
    "kueue.x-k8s.io/v1beta2/ResourceFlavor", "kueue.x-k8s.io/v1beta2/ClusterQueue",
    "kueue.x-k8s.io/v1beta2/LocalQueue", "mellanox.com/v1alpha1/NicClusterPolicy",
}  # fmt: skip


def strict(crd: dict[str, Any], version: str = "v1") -> dict[str, Any]:
    """The JSON schema of a custom resource, unknown fields refused at every depth."""
    (found,) = (v for v in crd["spec"]["versions"] if v["name"] == version)
    schema: dict[str, Any] = _closed(found["schema"]["openAPIV3Schema"])
    group, kind = crd["spec"]["group"], crd["spec"]["names"]["kind"]
    schema["properties"] |= {
        "apiVersion": {"const": f"{group}/{version}"},
        "kind": {"const": kind},
        "metadata": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "namespace": {"type": "string"},
                **{
                    key: {"type": "object", "additionalProperties": {"type": "string"}}
                    for key in ("labels", "annotations")
                },
            },
            "required": ["name"],
            "additionalProperties": False,
        },
    }
    schema["properties"].pop("status", None)
    schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
    return schema


def _closed(node: Any) -> Any:
    if isinstance(node, list):
        return [_closed(item) for item in node]
    if not isinstance(node, dict):
        return node
    kept = {
        key: {name: _closed(sub) for name, sub in value.items()}
        if key == "properties"
        else _closed(value)
        for key, value in node.items()
        if key not in {"description", "default", "format"} and not key.startswith("x-kubernetes")
    }
    if "properties" in kept and not node.get("x-kubernetes-preserve-unknown-fields"):
        kept.setdefault("additionalProperties", False)
    return kept


@functools.cache
def _schemas() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(gzip.decompress(FILE.read_bytes()))
    return loaded


@functools.cache
def _validator(kind: str) -> Draft202012Validator:
    definitions = _schemas()["definitions"]
    return Draft202012Validator({**schema_of(kind), "definitions": definitions})


def schema_of(kind: str) -> dict[str, Any]:
    """The schema of an apiVersion/Kind, whose references point into the bundle's definitions."""
    found: dict[str, Any] = _schemas()["kinds"][kind]
    return found


def kinds() -> set[str]:
    """apiVersion/Kind of all that can be checked."""
    return set(_schemas()["kinds"])


def violations(document: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(path, what is wrong) for each field of a document of one of `kinds`."""
    kind = f"{document['apiVersion']}/{document['kind']}"
    for error in _validator(kind).iter_errors(document):
        yield path_of(error), message_of(error)


def path_of(error: ValidationError) -> str:
    """As spec.containers[0].name."""
    path: str = error.json_path
    return path.removeprefix("$").removeprefix(".")


def message_of(error: ValidationError) -> str:
    """Without the instance, which may be a whole pod."""
    if error.validator == "anyOf" and error.context:
        return " or ".join(dict.fromkeys(message_of(one) for one in error.context))
    if error.validator in {"additionalProperties", "required", "enum", "const"}:
        return error.message
    return f"{str(error.instance)[:60]!r} is not of {error.validator} {error.validator_value}"
