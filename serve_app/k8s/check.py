"""`rayseek k8s check`: every problem of a set of manifests, before a cluster sees them.

First the form: YAML, known kinds, no nulls, strict schemas. The rules run on the objects that
passed, when all did, so they need not doubt types. Files are judged together: a Service is matched
with the pods of another file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from rayseek.serve_app.k8s import (  # noqa: F401 (they enter themselves into RULES)
    rules_around,
    rules_cell,
    rules_operator,
    rules_security,
    rules_serve,
)
from rayseek.serve_app.k8s.manifests import RULES, Manifests, name_of
from rayseek.serve_app.k8s.schemas import OTHERS, kinds, violations
from rayseek.serve_app.k8s.yaml_text import read

FORM_RULES = ("yaml", "kind", "null", "schema", "named-twice", "object-twice")
NAMED_LISTS = ("containers", "initContainers", "env", "ports", "volumes")


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong, where, and by which rule."""

    rule: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}  [{self.rule}]"


def rule_names() -> list[str]:
    return [*FORM_RULES, *RULES]


def check(files: Mapping[str, str], released: Mapping[str, str] | None = None) -> list[Problem]:
    """All problems of files (name -> text).

    released: of what runs already; a cell that is there too is also judged as an edit of it.
    """
    found: list[Problem] = []
    documents: list[dict[str, Any]] = []
    for file, source in files.items():
        for document in _read(file, source, found):
            problems = list(_form(file, document))
            found += problems
            if not problems:
                documents.append(document)
    found += _twice(documents)
    if found:
        return found
    before = [
        d
        for f, s in (released or {}).items()
        for d in _read(f, s, found)
        if d["kind"] == "RayService"
    ]
    manifests = Manifests(documents, before)
    for name, rule in RULES.items():
        found += [Problem(name, where, what) for where, what in rule(manifests)]
    return found


def _read(file: str, source: str, found: list[Problem]) -> list[dict[str, Any]]:
    try:
        documents = read(source)
    except yaml.YAMLError as error:
        found.append(Problem("yaml", file, " ".join(str(error).split())))
        return []
    kept = []
    for document in documents:
        if not isinstance(document, dict):
            found.append(Problem("yaml", file, "a document is no mapping"))
        elif document.get("apiVersion", "").startswith("kustomize.config.k8s.io/"):
            continue
        elif "kind" not in document or "apiVersion" not in document:
            found.append(Problem("kind", file, "a document without apiVersion or kind"))
        else:
            kept.append(document)
    return kept


def _form(file: str, document: dict[str, Any]) -> Iterator[Problem]:
    kind = f"{document['apiVersion']}/{document['kind']}"
    where = f"{file} {name_of(document)}"
    if kind not in kinds() | OTHERS:
        yield Problem("kind", where, f"{kind} is none of {', '.join(sorted(kinds() | OTHERS))}")
        return
    nulls = list(_nulls(document))
    for path in nulls:
        yield Problem("null", f"{where} {path}", "null: leave the key out")
    if kind in kinds() and not nulls:
        for path, message in violations(document):
            yield Problem("schema", f"{where} {path}", message)
    for path, name in _repeated(document):
        yield Problem("named-twice", f"{where} {path}", f"{name} twice")


def _nulls(node: Any, path: str = "") -> Iterator[str]:
    if node is None:
        yield path.removeprefix(".")
    children = node.items() if isinstance(node, dict) else ()
    for key, value in children:
        yield from _nulls(value, f"{path}.{key}")
    for index, value in enumerate(node if isinstance(node, list) else ()):
        yield from _nulls(value, f"{path}[{index}]")


def _repeated(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Lists whose items the API server keys by name: two of a name are refused or lost."""
    if isinstance(node, list):
        for index, value in enumerate(node):
            yield from _repeated(value, f"{path}[{index}]")
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        inner = f"{path}.{key}".removeprefix(".")
        yield from _repeated(value, inner)
        if key in NAMED_LISTS and isinstance(value, list):
            names = [v.get("name") for v in value if isinstance(v, dict) and v.get("name")]
            numbers = [
                v["containerPort"] for v in value if isinstance(v, dict) and "containerPort" in v
            ]
            for many in (names, numbers):
                for name in sorted({n for n in many if many.count(n) > 1}, key=str):
                    yield inner, str(name)


def _twice(documents: list[dict[str, Any]]) -> Iterator[Problem]:
    seen: set[tuple[str, str | None]] = set()
    for document in documents:
        key = name_of(document), document["metadata"].get("namespace")
        if key in seen:
            yield Problem(
                "object-twice", key[0], "stands here twice; one would overwrite the other"
            )
        seen.add(key)
