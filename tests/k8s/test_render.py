"""What is rendered: fresh, as the layout says, as the schemas and kustomize take it."""

from __future__ import annotations

import gzip
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayseek.cluster.config import Config, TraceSettings, load_config
from rayseek.cluster.layout import layout
from rayseek.model.official import DEEPSEEK_V3
from rayseek.serve_app.k8s.groups import Group, groups
from rayseek.serve_app.k8s.pods import drain_script, gib, worker_pod
from rayseek.serve_app.k8s.schemas import schema_of, strict
from rayseek.serve_app.k8s.yaml_text import read, text

pytestmark = pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")

ROOT = Path(__file__).parents[2]
OVERLAYS = sorted(path.name for path in (ROOT / "k8s/overlays").iterdir())


@pytest.mark.parametrize("name", OVERLAYS)
def test_committed_overlays_are_fresh(name: str) -> None:
    from rayseek.serve_app.k8s.render import overlay

    for file, content in overlay(load_config(name), name).items():
        assert (ROOT / "k8s/overlays" / name / file).read_text() == content, (
            f"rayseek k8s render {name} --out k8s/overlays/{name}"
        )


@pytest.mark.parametrize("name", OVERLAYS)
def test_proxies_hold_all_that_run_and_a_queue(name: str) -> None:
    config = load_config(name)
    text = (ROOT / "k8s/overlays" / name / "rayservice.yaml").read_text()
    (held,) = set(re.findall(r"RAY_SERVE_HAPROXY_MAXCONN\s+value: .(\d+).", text))
    running = config.decode.units * config.decode.attention_ranks
    running *= config.engine_of("decode").max_batch
    queues = config.api.max_waiting * config.ingress.replicas
    assert int(held) * config.kubernetes.ingress_pods >= running + queues
    assert 4096 <= int(held) < 2**15, "two files each, of 65,536"


@pytest.mark.parametrize("folder", OVERLAYS)
def test_kustomize_builds(folder: str) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl here")
    built = subprocess.run(
        ["kubectl", "kustomize", str(ROOT / "k8s/overlays" / folder)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    documents = read(built)
    namespaced = [d for d in documents if d["kind"] == "RayService"]
    assert [d["metadata"]["namespace"] for d in namespaced] == ["rayseek"]
    original = read((ROOT / "k8s/overlays" / folder / "rayservice.yaml").read_text())
    assert namespaced[0]["spec"] == original[0]["spec"]


def test_components_that_no_overlay_has_change_only_what_they_say(tmp_path: Path) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl here")
    from rayseek.serve_app.k8s.render import write

    copied = tmp_path / "k8s"
    shutil.copytree(ROOT / "k8s", copied)
    config = load_config("h200-8")
    cell = config.kubernetes.model_copy(update={"components": ("mtls",)})
    write(config.model_copy(update={"kubernetes": cell}), "x", copied / "overlays/x")
    built = subprocess.run(
        ["kubectl", "kustomize", str(copied / "overlays/x")],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    (service,) = (d for d in read(built) if d["kind"] == "RayService")
    assert service["spec"]["rayClusterConfig"].pop("tlsOptions") == {"enabled": True}
    (original,) = read((copied / "overlays/x/rayservice.yaml").read_text())
    assert service["spec"] == original["spec"]


def test_every_component_is_offered_by_the_config() -> None:
    from rayseek.serve_app.k8s.around import kustomization

    values: list[dict[str, Any]] = [
        {"components": ["gateway", "grafana", "kueue", "mtls"], "gcs": "redis"},
        {"fabric": {"kind": "ib"}, "weights": {"claim": "a"}},
        {"fabric": {"kind": "roce"}, "weights": {"node_path": "/a"}},
    ]
    named = {
        Path(component).name
        for value in values
        for component in kustomization(Config.model_validate({"kubernetes": value}))["components"]
    }
    assert named == {path.name for path in (ROOT / "k8s/components").iterdir()}


def test_groups_of_deepseeks_cell() -> None:
    config = load_config("h800-cell-18")
    found = groups(config, layout(config, DEEPSEEK_V3))
    assert [(g.name, g.replicas, g.least, g.most, g.hosts, g.gpus) for g in found] == [
        ("ingress", 4, 4, 4, 1, 0), ("prefill", 3, 2, 5, 4, 8), ("decode", 18, 18, 18, 1, 8)
    ]  # fmt: skip


def test_units_smaller_than_a_node_share_pods() -> None:
    config = Config.model_validate(
        {
            "hardware": {"accelerator": "H200"},
            "decode": {"units": 5, "attention_ranks": 2, "experts": "dedicated", "expert_ranks": 4},
        }
    )
    found = {g.name: g for g in groups(config, layout(config, DEEPSEEK_V3))}
    worker = config.kubernetes.worker
    assert found["decode"] == Group("decode", 2, 2, 2, 1, 8, worker)
    assert found["experts"] == Group("experts", 3, 3, 3, 1, 8, worker)


def test_pods_follow_the_ranges() -> None:
    """Whole units, and experts with the units that they are for."""
    hardware, scaled = {"accelerator": "H800"}, {"prefill": {"least": 1, "most": 9}}
    prefill = {"units": 2, "attention_ranks": 4}
    decode = {"units": 2, "attention_ranks": 16, "experts": "dedicated", "expert_ranks": 32}
    scaled["decode"] = {"least": 1, "most": 3}
    config = Config.model_validate(
        {"hardware": hardware, "prefill": prefill, "decode": decode, "autoscaling": scaled}
    )
    found = {
        g.name: (g.least, g.replicas, g.most) for g in groups(config, layout(config, DEEPSEEK_V3))
    }
    assert found == {
        "ingress": (2, 2, 2), "prefill": (1, 1, 5), "decode": (2, 4, 6), "experts": (4, 8, 12)
    }  # fmt: skip
    cpu = config.model_copy(update={"hardware": Config().hardware})
    assert [g.most for g in groups(cpu, layout(cpu, DEEPSEEK_V3))] == [2, 1, 1, 1]


def test_the_schema_is_the_crd_made_strict() -> None:
    packed = (Path(__file__).parent / "ray.io_rayservices.yaml.gz").read_bytes()
    crd = yaml.load(gzip.decompress(packed), Loader=yaml.CSafeLoader)
    assert schema_of("ray.io/v1/RayService") == strict(crd)


def test_a_pod_leaves_when_its_last_client_has_left(tmp_path: Path) -> None:
    row = " 0: 0100007F:{:04X} 0100007F:D431 {} 00000000:00000000 00:00000000 00000000\n"
    table = tmp_path / "tcp"
    pattern = re.findall(r"'(.*?)'", drain_script(8000, 9000, tables=str(table)))[0]
    for content, busy in [
        (row.format(8000, "01"), True), (row.format(8000, "0A"), False),
        (row.format(9000, "01"), True), (row.format(8001, "01"), False), ("", False),
    ]:  # fmt: skip
        table.write_text(content)
        found = subprocess.run(["grep", "-qE", pattern, table], check=False)
        assert (found.returncode == 0) == busy


@pytest.mark.parametrize("port", [None, 9000])
def test_clients_of_both_doors_are_waited_for(port: int | None) -> None:
    config = load_config("cpu-smoke")
    ingress = config.ingress.model_copy(update={"grpc_port": port})
    cell = config.model_copy(update={"ingress": ingress})
    (group, *_) = groups(cell, layout(cell, DEEPSEEK_V3))
    (container,) = worker_pod(cell, group)["spec"]["containers"]
    assert container["lifecycle"]["preStop"]["exec"]["command"][-1] == drain_script(8000, port)


def test_only_nodes_with_gpus_have_a_copy_of_the_weights() -> None:
    """Head and ingress pods are on any node, where the folder may not be: they read the claim."""
    (service,) = read((ROOT / "k8s/overlays/h800-cell-18/rayservice.yaml").read_text())
    cluster = service["spec"]["rayClusterConfig"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        spec = group["template"]["spec"]
        (models,) = (v for v in spec["volumes"] if v["name"] == "models")
        on_gpu_node = "nvidia.com/gpu" in spec["containers"][0]["resources"]["limits"]
        assert ("hostPath" in models) == on_gpu_node
        assert models.get("persistentVolumeClaim", {}).get("claimName") in (None, "rayseek-weights")


@pytest.mark.parametrize("endpoint, port", [("http://otel.watch:4318", 4318), ("https://t", 443)])
def test_traces_reach_their_collector(endpoint: str, port: int) -> None:
    from rayseek.serve_app.k8s.render import overlay

    config = load_config("cpu-smoke")
    plain, traced = (
        overlay(c, "cpu-smoke")
        for c in (config, config.model_copy(update={"traces": TraceSettings(endpoint=endpoint)}))
    )
    policies = [
        next(d for d in yaml.safe_load_all(files["cell.yaml"]) if d["kind"] == "NetworkPolicy")
        for files in (plain, traced)
    ]
    within, also = policies[1]["spec"]["egress"]
    assert [within] == policies[0]["spec"]["egress"]
    assert also == {"ports": [{"protocol": "TCP", "port": port}]}
    assert endpoint in traced["rayservice.yaml"] and endpoint not in plain["rayservice.yaml"]


def test_yaml_texts_survive() -> None:
    document = {"a": "x: 1\ny: 2\n", "b": [{"c": "1"}], "d": ["None", "0440"]}
    assert read(text(document)) == [document]
    with pytest.raises(yaml.YAMLError, match="a twice"):
        read("{a: 1, a: 2}")
    assert (gib(2), gib(2.5)) == ("2Gi", "2560Mi")


def test_the_image_has_the_versions_and_programs_that_the_manifests_rely_on() -> None:
    dockerfile = (ROOT / "k8s/Dockerfile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (pinned,) = (d for d in project["dependencies"] if d.startswith("ray[serve]=="))
    ray = pinned.split("==")[1]
    image = Config().kubernetes.image
    assert f"ARG RAY_VERSION={ray}\n" in dockerfile
    assert image.endswith(f":{project['version']}-ray{ray}") and image in dockerfile
    for program in ("bash", "wget", "g++"):
        assert re.search(rf"\s{re.escape(program)}\s", dockerfile)
    assert "USER 1000:1000" in dockerfile and "PYTHONDONTWRITEBYTECODE" not in dockerfile
    smoke = load_config("cpu-smoke")
    assert f"mv model/small {smoke.model.path}" in dockerfile
    for file in (ROOT / "k8s/components").rglob("*.yaml"):
        for found in re.findall(r"image: (\S*/rayseek:\S+)", file.read_text()):
            assert found == image, file


def test_every_dashboard_is_listed() -> None:
    listed = yaml.safe_load((ROOT / "k8s/grafana/kustomization.yaml").read_text())
    files = {f for g in listed.get("configMapGenerator", []) for f in g["files"]}
    assert files == {path.name for path in (ROOT / "k8s/grafana").glob("*.json")}
