"""`rayseek k8s check`: overlays pass, each broken manifest is refused for the right reason."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayseek.serve_app.k8s.check import Problem, check, rule_names
from rayseek.serve_app.k8s.yaml_text import read, text

pytestmark = pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")

K8S = Path(__file__).parents[2] / "k8s"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
BROKEN = yaml.safe_load((Path(__file__).parent / "broken.yaml").read_text())


def parts(folder: Path) -> dict[str, str]:
    """The files that a kustomization is made of."""
    listed = yaml.safe_load((folder / "kustomization.yaml").read_text())
    found: dict[str, str] = {}
    for name in [*listed.get("resources", []), *listed.get("components", [])]:
        path = (folder / name).resolve()
        found |= parts(path) if path.is_dir() else {str(path): path.read_text()}
    return found


CLEAN = {name: parts(K8S / "overlays" / name) for name in OVERLAYS}


@pytest.mark.parametrize("name", OVERLAYS)
def test_overlays_are_clean(name: str) -> None:
    assert check(CLEAN[name], CLEAN[name]) == []


def broken(overlay: str, target: str, path: str, value: Any) -> dict[str, str]:
    """The overlay's files with one change."""
    files = dict(CLEAN[overlay])
    if target == "-":
        return {**files, "more.yaml": value}
    for file, source in files.items():
        for document in read(source):
            if f"{document['kind']}/{document['metadata']['name']}" != target:
                continue
            if path == "COPY":
                return {**files, "copy.yaml": text(document)}
            changed = copy.deepcopy(document)
            if path.startswith("serve."):
                (serve,) = read(changed["spec"]["serveConfigV2"])
                put(serve, path.removeprefix("serve."), value)
                changed["spec"]["serveConfigV2"] = text(serve)
            else:
                put(changed, path, value)
            rest = [d for d in read(source) if d != document]
            return {**files, file: "---\n".join(map(text, [*rest, changed]))}
    raise AssertionError(f"{overlay} has no {target}")


def put(node: Any, path: str, value: Any) -> None:
    """Follow keys and indices. A mapping onto a mapping in a list changes its keys only."""
    while path:
        if isinstance(node, dict):
            key = next((k for k in sorted(node, key=len, reverse=True)
                        if path == k or path.startswith(f"{k}.")), None)  # fmt: skip
            if key is None:
                key = path.split(".", 1)[0] if "/" not in path else path
            rest = path[len(key) :].removeprefix(".")
            if rest:
                node, path = node.setdefault(key, {}), rest
                continue
            if value == "DELETE":
                del node[key]
            else:
                node[key] = value
            return
        index, _, path = path.partition(".")
        if index == "+":
            node.append(value)
        elif path:
            node = node[int(index)]
            continue
        elif isinstance(value, dict) and not value.get("name"):
            node[int(index)].update(value)
        else:
            node[int(index)] = value
        return


@pytest.mark.parametrize("case", BROKEN, ids=lambda c: f"{c[0]}-{c[1]}-{str(c[3])[-40:]}")
def test_broken_manifests_are_refused_for_the_right_reason(case: list[Any]) -> None:
    wanted, overlay, target, path, value = case[:5]
    found = check(
        broken(overlay, target, path, value), CLEAN[overlay] if wanted == "frozen" else {}
    )
    rules = {problem.rule for problem in found}
    assert wanted in rules and rules <= {wanted, *(case[5] if len(case) > 5 else [])}, found


def test_every_rule_has_a_broken_manifest() -> None:
    assert {case[0] for case in BROKEN} == set(rule_names()) and len(BROKEN) >= 60


def test_a_problem_says_where_and_by_which_rule() -> None:
    files = broken("cpu-smoke", "RayService/rayseek", "spec.upgradeStrategy.type", "newcluster")
    (problem,) = check(files)
    assert isinstance(problem, Problem)
    assert str(problem).startswith("RayService/rayseek: upgradeStrategy.type is 'newcluster'")
    assert str(problem).endswith("[upgrade-type]")
