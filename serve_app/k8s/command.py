"""`rayseek k8s`: render an overlay from a config, check manifests."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rayseek.cluster.config import load_config
from rayseek.serve_app.k8s.check import check, rule_names
from rayseek.serve_app.k8s.render import overlay, write


def render(arguments: argparse.Namespace) -> None:
    """Write an overlay's files, or print them."""
    config = load_config(arguments.config)
    if arguments.out is None:
        print("---\n".join(overlay(config, arguments.config).values()), end="")
        return
    for path in write(config, arguments.config, arguments.out):
        print(f"wrote {path}")


def verify(arguments: argparse.Namespace) -> bool:
    """Print every problem; whether there is none. Raises OSError for a file that is not there."""
    files = _texts(arguments.files)
    released = _texts([arguments.released]) if arguments.released else None
    problems = check(files, released)
    for problem in problems:
        print(problem)
    if not problems:
        print(f"{len(files)} files, {len(rule_names())} rules: no problem.")
    return not problems


def _texts(paths: list[Path]) -> dict[str, str]:
    """- is what comes in; a folder, every .yaml file in it."""
    found: dict[str, str] = {}
    for path in paths:
        if str(path) == "-":
            found["-"] = sys.stdin.read()
            continue
        for file in sorted(path.glob("*.yaml")) if path.is_dir() else [path]:
            found[str(file)] = file.read_text()
    return found
