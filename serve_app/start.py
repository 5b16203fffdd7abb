"""A config made into a running service on this machine: its folders, its model, its keys."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rayseek.cluster.config import Config, load_config
from rayseek.model.config import ModelConfig
from rayseek.model.shipped import SHIPPED
from rayseek.serve_app.local import Running, StartError, check_port, running


def configured(arguments: argparse.Namespace) -> Config:
    """The config that a command names, with the command's words on top, checked like the file's."""
    config = load_config(arguments.config) if arguments.config else Config()
    words = vars(arguments)
    changes = {
        "model": {"path": words.get("model")},
        "ingress": {"port": words.get("port"), "host": words.get("host")},
        "api": {"key_file": words.get("key_file")},
    }
    data = config.model_dump()
    for branch, values in changes.items():
        data[branch] |= {name: value for name, value in values.items() if value is not None}
    return Config.model_validate(data)


def cache_folder() -> Path:
    """Where models made on first start are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rayseek"


def config_folder() -> Path:
    """Where API keys are kept."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "rayseek"


def key_file(config: Config) -> Path | None:
    """The file of keys. None: the config has keys of its own and no such file is there."""
    file = config_folder() / "keys.yaml"
    if config.api.key_file is not None:
        return config.api.key_file.absolute()
    return file if file.exists() or not config.api.keys else None


def served_model(config: Config) -> Path:
    """The configured checkpoint, or the trained small one that comes with Rayseek."""
    return SHIPPED if config.model.path is None else config.model.path.absolute()


def made_model(path: Path, config: ModelConfig) -> Path:
    """A random checkpoint of this config at `path`; several processes may ask for it at once."""
    from rayseek.model.maker import make_checkpoint

    if not path.exists():
        print(f"Making a random-weight model in {path} (once) ...", flush=True)
        try:
            make_checkpoint(path, config)
        except OSError:
            if not path.exists():
                raise
    return path


@contextlib.contextmanager
def started(config: Config, nodes: int = 1, deployed: bool = False) -> Iterator[Running]:
    """The service of this config, until the block ends. Raises StartError and ValueError.

    nodes: of Ray, on this machine. deployed: by a Serve config file, as on a cluster.
    """
    from rayseek.cluster.build import engine_limits
    from rayseek.model.checkpoint import Checkpoint
    from rayseek.serve_app.ingress import api_settings
    from rayseek.serve_app.keys import KeyRing, first_key
    from rayseek.serve_app.tokenizer import Tokenizer

    check_port(config.ingress.host, config.ingress.port)
    model = served_model(config)
    checkpoint = Checkpoint.open(model)  # every problem is told now, not by a dying rank
    Tokenizer.from_pretrained(model)  # or by an ingress that is started again and again
    context = min(
        engine_limits(checkpoint.config, config.engine_of(role)).context for role in config.units
    )
    file = key_file(config)
    shown = config.api.keys[0] if config.api.keys else None
    if shown is None and file == config_folder() / "keys.yaml":
        shown = first_key(file, config_folder() / "api_key")
    if not len(KeyRing(config.api.keys, file)):
        raise StartError(f"{file} has no keys: rayseek keys add NAME --file {file}")
    print(f"Starting Ray and the engine for {model} ...", flush=True)
    settings = api_settings(config, context, file, shown)
    whole = _with_files(config, model, shown, file) if deployed else None
    with running(config, model, settings, nodes, whole) as service:
        yield replace(service, shown_key=shown)


def _with_files(config: Config, model: Path, shown: str | None, keys: Path | None) -> Config:
    """With the model and the keys of this machine, as `rayseek config render` wants them."""
    api = {"keys": (shown,), "key_file": None} if shown else {"key_file": keys}
    changes = {
        "model": config.model.model_copy(update={"path": model}),
        "api": config.api.model_copy(update=api),
    }
    return config.model_copy(update=changes)
