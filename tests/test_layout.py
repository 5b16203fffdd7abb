"""The four folders are the layers of `rayseek`: what may import what, and what a wheel holds."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from rayseek.cluster.config import Config

ROOT = Path(__file__).parents[1]
LAYERS = ["kernels", "model", "cluster", "serve_app"]  # each may import those before it
SOURCES = [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]
FORBIDDEN = {  # libraries that a layer must not know
    "kernels": {"ray", "fastapi", "starlette", "grpc", "safetensors"},
    "model": {"ray", "fastapi", "starlette", "grpc"},
    "cluster": {"fastapi", "starlette", "uvicorn", "httpx"},
    "serve_app": {"torch", "grpc", "safetensors"},
}
ALLOWED = {
    "serve_app/bench.py": {"torch"},  # times the engine and transformers in-process
    "serve_app/grpc_door.py": {"grpc"},  # the API as gRPC: what it does is serve it
}


def imports(path: Path) -> set[str]:
    """Every module a file imports, anywhere in it, as dotted names."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write the full name, not a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path: Path) -> None:
    relative = path.relative_to(ROOT)
    layer = relative.parts[0]
    names = imports(path)
    ours = {name.split(".")[1] for name in names if name.startswith("rayseek.")}
    above = ours & set(LAYERS[LAYERS.index(layer) + 1 :])
    assert not above, f"{layer}/ must not import {above}"
    plain = {name for name in names if name.split(".")[0] in LAYERS}
    assert not plain, f"write rayseek.{plain.pop()}: the plain name would be a second module"
    known = {name.split(".")[0] for name in names}
    unwanted = known & FORBIDDEN[layer] - ALLOWED.get(str(relative), set())
    assert not unwanted, f"{layer}/ must not know {unwanted}"


def test_folders_stay_namespace_packages() -> None:
    """An __init__.py would shadow Hugging Face's `kernels` for whoever runs from the root."""
    assert not list(ROOT.glob("*/__init__.py"))


def test_wheel_holds_every_folder() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {"rayseek." + ".".join(path.parent.relative_to(ROOT).parts) for path in SOURCES}
    assert found == set(listed)


@pytest.mark.parametrize("module", ["serve_app.ingress", "cluster.unit", "serve_app.cli"])
def test_processes_without_tensors_do_not_load_torch(module: str) -> None:
    """The ingress, a unit's leader and the command start fast and stay small."""
    code = f"import sys, rayseek.{module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_readme_has_every_config_key_with_its_default() -> None:
    (shown,) = re.findall(r"```yaml\n(model: .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert yaml.safe_load(shown) == Config().model_dump(mode="json")
