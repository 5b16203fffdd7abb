"""`rayseek config`: exit codes and messages, and a Serve config file that Serve takes."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import yaml

from rayseek.cluster.config import Config, load_config, shipped_configs
from rayseek.serve_app.cli import main
from rayseek.serve_app.keys import add_key

# What Ray's own classes cause when they are imported, which is why the tests do it inside.
pytestmark = pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")

CELL = ["config", "check", "h800-cell-18", "--spec", "671b"]


def test_check_shows_memory_deployments_and_every_rank(capsys: pytest.CaptureFixture[str]) -> None:
    main(CELL)
    shown = capsys.readouterr().out
    for text in ("79.00 GiB", "KV pages", "STRICT_SPREAD", "17 x CPU 64, GPU 8", "136-143",
                 "on 30 nodes", "h800-cell-18 fits."):  # fmt: skip
        assert text in shown
    assert max(map(len, shown.splitlines())) <= 100


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_configs_pass(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    known: dict[str, list[str]] = {"laptop": [], "cpu": ["--spec", "small"]}
    spec = known.get(name.split("-", maxsplit=1)[0], ["--spec", "671b"])
    main(["config", "check", name, *spec])
    assert f"{name} fits." in capsys.readouterr().out


def test_check_tells_of_limits_that_cannot_be_divided(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_key(tmp_path / "keys.yaml", "few", concurrent=2)
    add_key(tmp_path / "keys.yaml", "many", concurrent=3)
    file = tmp_path / "c.yaml"
    file.write_text(f"ingress: {{replicas: 3}}\napi: {{key_file: {tmp_path / 'keys.yaml'}}}")
    main(["config", "check", str(file), "--spec", "small"])
    shown = capsys.readouterr().out
    assert "key few: 3 ingress replicas" in shown and "key many" not in shown


def test_check_fails_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "small.yaml"
    file.write_text("decode: {attention_ranks: 8}\nhardware: {accelerator: H100}")
    with pytest.raises(SystemExit, match="1"):
        main(["config", "check", str(file), "--spec", "671b"])
    shown = capsys.readouterr().out
    assert "- decode attention rank: needs" in shown and "fits." not in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["config", "check", "desktop"], "neither a .yaml file nor one of"),
        (["config", "check", "h800-cell-18"], "--spec 671b checks without one"),
        (["config", "render", "laptop"], "model.path is None"),
        (["config", "render", "laptop", "--model", "/m"], "api.key_file is not set"),
        (["serve", "h800-16"], "for a cluster of H800 nodes"),
    ],
)
def test_mistakes_are_explained(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="1"):
        main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:The `metrics_interval_s` field:DeprecationWarning")
@pytest.mark.parametrize("name", shipped_configs())
def test_rendered_files_are_what_serve_expects(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["config", "render", name, "--model", "/models/v3", "--key-file", "/keys.yaml"])
    text = capsys.readouterr().out
    assert text.startswith("# Every Ray process") and "RAY_SERVE_ENABLE_HA_PROXY=1" in text
    from ray.serve.schema import ServeDeploySchema

    file = ServeDeploySchema.model_validate(yaml.safe_load(text))
    (app,) = file.applications
    module, _, builder = app.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), builder))
    told, wanted = Config.model_validate(app.args), load_config(name)
    assert str(told.model.path) == "/models/v3" and str(told.api.key_file) == "/keys.yaml"
    unlike = {name: getattr(wanted, name) for name in ("model", "api", "kubernetes")}
    assert told.model_copy(update=unlike) == wanted


def test_the_builder_makes_the_application(
    tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "grpc.yaml"
    file.write_text("ingress: {grpc_port: 9000}\napi: {keys: [sk-0123456789abcdef]}")
    main(["config", "render", str(file), "--model", str(tiny_path)])
    from ray.serve import Application
    from ray.serve.schema import ServeDeploySchema

    rendered = ServeDeploySchema.model_validate(yaml.safe_load(capsys.readouterr().out))
    assert rendered.grpc_options is not None and rendered.grpc_options.port == 9000
    (app,) = rendered.applications
    module, _, builder = app.import_path.partition(":")
    build = getattr(importlib.import_module(module), builder)
    assert isinstance(build(app.args), Application)
    with pytest.raises(ValueError, match="no API keys"):
        build(app.args | {"api": {}})
