"""`rayseek k8s render`: the files of an overlay, from a config."""

from __future__ import annotations

import os
from pathlib import Path

from rayseek.cluster.config import Config
from rayseek.cluster.layout import layout
from rayseek.model.official import DEEPSEEK_V3
from rayseek.serve_app.k8s.around import budgets, cell_policy, kustomization, service
from rayseek.serve_app.k8s.rayservice import rayservice
from rayseek.serve_app.k8s.yaml_text import documents_text


def overlay(config: Config, source: str) -> dict[str, str]:
    """File name -> text. `source`: the config's name, for the header.

    Raises ValueError if the cell could not find model or keys.
    """
    plan = layout(config, DEEPSEEK_V3)  # pods and bundles are the same for a smaller one
    files = {
        "rayservice.yaml": documents_text(rayservice(config, plan)),
        "cell.yaml": documents_text(service(config), *budgets(config, plan), cell_policy(config)),
        "kustomization.yaml": documents_text(kustomization(config)),
    }
    header = f"# Rendered; do not edit. To change it: rayseek k8s render {source}\n"
    return {name: header + content for name, content in files.items()}


def write(config: Config, source: str, folder: Path) -> list[Path]:
    """Write the overlay's files into `folder` and return them."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, content in overlay(config, source).items():
        path = folder / name
        part = path.with_suffix(".part")
        part.write_text(content)
        os.replace(part, path)
        written.append(path)
    return written
