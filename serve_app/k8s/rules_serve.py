"""The Serve config inside a RayService: KubeRay takes any text, and Serve any further key.

Ray is imported inside the rules: seconds that only they need.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import Any

from jsonschema import Draft202012Validator
from pydantic import ValidationError

from rayseek.cluster.config import Config
from rayseek.serve_app.k8s.manifests import Finding, Manifests, rule
from rayseek.serve_app.k8s.schemas import message_of, path_of

IMPORT_PATH = "rayseek.serve_app.application:application"
OPEN = {"args", "user_config"}  # an application's own


@functools.cache
def _schema() -> Draft202012Validator:
    """Serve's own, with unknown keys refused wherever keys are named."""
    from ray.serve.schema import ServeDeploySchema

    return Draft202012Validator(_closed(ServeDeploySchema.model_json_schema()))


def _no_deprecations() -> warnings.catch_warnings[None]:
    """Serve deprecates metrics_interval_s, but reads nothing else in its place."""
    return warnings.catch_warnings(action="ignore", category=DeprecationWarning)


def _closed(node: Any) -> Any:
    if isinstance(node, list):
        return [_closed(item) for item in node]
    if not isinstance(node, dict):
        return node
    closed = {key: value if key in OPEN else _closed(value) for key, value in node.items()}
    if "properties" in closed and isinstance(closed["properties"], dict):
        closed["additionalProperties"] = False
    return closed


@rule
def serve_text(all_: Manifests) -> Iterator[Finding]:
    for cell in all_.cells:
        if cell.serve is None:
            yield f"{cell.name} serveConfigV2", "is not one YAML mapping with each key once"


@rule
def serve_schema(all_: Manifests) -> Iterator[Finding]:
    from ray.serve.schema import ServeDeploySchema

    for cell in all_.cells:
        if cell.serve is None:
            continue
        where = f"{cell.name} serveConfigV2"
        found = [(path_of(e), message_of(e)) for e in _schema().iter_errors(cell.serve)]
        for path, message in found:
            yield f"{where} {path}", message
        if found:
            continue
        try:
            with _no_deprecations():
                ServeDeploySchema.model_validate(cell.serve)
        except ValidationError as error:
            for one in error.errors():
                yield f"{where} {'.'.join(map(str, one['loc']))}", one["msg"]


@rule
def serve_autoscaling(all_: Manifests) -> Iterator[Finding]:
    from ray.serve.config import AutoscalingConfig

    for of, _, deployment in all_.deployments():
        given, where = deployment.get("autoscaling_config"), f"{of} autoscaling_config"
        if not isinstance(given, dict):
            continue
        for name in sorted(set(given) - set(AutoscalingConfig.model_fields)):
            yield f"{where}.{name}", "no such key"
        try:
            with _no_deprecations():
                AutoscalingConfig.model_validate(given)
        except ValidationError as error:
            yield where, error.errors()[0]["msg"]


@rule
def serve_application(all_: Manifests) -> Iterator[Finding]:
    for cell in all_.cells:
        if cell.serve is None:
            continue
        where = f"{cell.name} applications"
        if len(cell.applications) != 1:
            yield where, f"a cell has one application, not {len(cell.applications)}"
        for one in cell.applications:
            if one.get("import_path") != IMPORT_PATH:
                yield where, f"import_path is {one.get('import_path')!r}, not {IMPORT_PATH}"
            try:
                Config.model_validate(one.get("args") or {})
            except ValidationError as error:
                for problem in error.errors():
                    path = ".".join(map(str, problem["loc"]))
                    yield f"{where}[0].args {path}", problem["msg"]
