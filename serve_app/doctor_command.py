"""`rayseek doctor`: is this machine ready for a config? Gathers, asks `cluster/doctor.py`, prints.

Here is what belongs to the service: its ports, its checkpoint and its keys.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rayseek.cluster.config import Config
from rayseek.cluster.doctor import Finding, Port, diagnose, needs_of
from rayseek.model.config import ConfigError, ModelConfig
from rayseek.serve_app.local import StartError, check_port
from rayseek.serve_app.start import configured, key_file, served_model

ANSWER_S = 3.0


def doctor(arguments: argparse.Namespace) -> bool:
    """Print one line for each check; whether there is no problem."""
    from rayseek.cluster.machine import facts_of_this_machine

    config = configured(arguments)
    path = served_model(config)
    spec, weights = weights_of(path)
    needs = needs_of(config, spec, ranks=not arguments.without_ranks)
    keys, keys_problem = keys_of(config)
    facts = replace(
        facts_of_this_machine(needs),
        ports=tuple(ports_of(config)),
        model=str(path),
        weights=tuple(weights),
        tokenizer=tokenizer_problem(path),
        keys=keys,
        keys_problem=keys_problem,
    )
    found = diagnose(needs, facts)
    well = all(finding.state != "problem" for finding in found)
    if arguments.json:
        print(json.dumps({"ok": well, "findings": [asdict(finding) for finding in found]}))
    else:
        print(shown(found))
    return well


def shown(findings: Sequence[Finding]) -> str:
    """As lines; below what is not well, what to do."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:8} {finding.check:11} {finding.what}")
        if finding.todo:
            lines.append(f"{'':20} -> {finding.todo}")
    return "\n".join(lines)


def weights_of(path: Path) -> tuple[ModelConfig | None, list[str]]:
    """The model in a checkpoint folder, and all that is wrong there."""
    from rayseek.model.checkpoint import Checkpoint, CheckpointError

    try:
        return Checkpoint.open(path).config, []
    except ConfigError as error:
        return None, error.problems
    except CheckpointError as error:
        return ModelConfig.from_pretrained(path), error.problems


def tokenizer_problem(path: Path) -> str:
    """Empty if there is none."""
    from rayseek.serve_app.tokenizer import Tokenizer

    try:
        Tokenizer.from_pretrained(path)
    except ValueError as error:
        return str(error)
    return ""


def keys_of(config: Config) -> tuple[str, str]:
    """Which keys there are, and why they cannot be had; one of the two is empty."""
    from rayseek.serve_app.keys import read_keys

    file, own = key_file(config), len(config.api.keys)
    if file is None:
        return f"{own} in the config", ""
    if not file.exists() and config.api.key_file is None:
        return f"{file} will be made with a first key", ""
    try:
        count = len(read_keys(file))
    except OSError as error:
        return "", f"{file}: {error.strerror}"
    except ValueError as error:
        return "", str(error)
    if not count + own:
        return "", f"{file} has no keys"
    return f"{count} in {file}" + (f", {own} in the config" if own else ""), ""


def ports_of(config: Config) -> list[Port]:
    """The API's ports here, and who listens there."""
    ours = {"API": config.ingress.port}
    if config.ingress.grpc_port is not None:
        ours["gRPC"] = config.ingress.grpc_port
    serving = is_rayseek(config.ingress.port)
    return [
        Port(what, port, "" if is_free(config.ingress.host, port) else
             "rayseek" if serving else "another")
        for what, port in ours.items()
    ]  # fmt: skip


def is_free(host: str, port: int) -> bool:
    with contextlib.suppress(StartError):
        check_port(host, port)
        return True
    return False


def is_rayseek(port: int) -> bool:
    """Whether our API answers on this port of this machine."""
    url = f"http://127.0.0.1:{port}/openapi.json"
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_S) as answer:
            title = json.load(answer)["info"]["title"]
    except (OSError, ValueError, LookupError, TypeError, http.client.HTTPException):
        return False
    return str(title).startswith("Rayseek")
