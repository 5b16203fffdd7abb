"""The whole chain once for real: load, Serve's application-level policy, Ray's autoscaler, nodes.

Ray's fake provider makes a "node" of this machine for every pod that KubeRay would make; the Serve
config is the one inside the RayService. Minutes, so only with `pytest --full`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from rayseek.cluster.config import Config
from rayseek.cluster.layout import layout
from rayseek.model.config import ModelConfig
from rayseek.serve_app.changes import ServeApi
from rayseek.serve_app.chaos import GIVE_UP_S, prompts, stream
from rayseek.serve_app.conformance import Endpoint
from rayseek.serve_app.local import free_port, serve_environment

pytestmark = [
    # Ray's own, when its fake provider is imported
    pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20"),
    pytest.mark.ray,
    pytest.mark.timeout(3000),
]
HEAD = "f" * 51 + "00000"
HEAD_TYPE = "ray.head.default"  # what the fake provider calls it
KEY = "sk-scale"
STREAMS = 12
PATIENCE_S = 900.0


@dataclass
class Cluster:
    api: ServeApi
    url: str
    dashboard: str
    token: str

    def nodes(self) -> dict[str, int]:
        """Nodes that are alive, by the role that they are for."""
        request = urllib.request.Request(
            f"{self.dashboard}/api/v0/nodes?detail=1&limit=100",
            headers={"Authorization": f"Bearer {self.token}"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            listed = json.load(answer)["data"]["result"]["result"]
        roles = [n["labels"].get("role", "") for n in listed if n["state"] == "ALIVE"]
        return {role: roles.count(role) for role in sorted(set(roles))}

    def running(self) -> dict[str, int]:
        """Replicas that run, by deployment."""
        return {
            name: sum(state == "RUNNING" for state in of.values())
            for name, of in self.api.replicas().items()
        }


def until(what: str, true: Callable[[], bool]) -> float:
    """Wait for it; how long it took."""
    began = time.monotonic()
    while time.monotonic() < began + PATIENCE_S:
        with contextlib.suppress(OSError):
            if true():
                return time.monotonic() - began
        time.sleep(1)
    raise AssertionError(f"not within {PATIENCE_S:.0f} s: {what}")


@pytest.fixture
def cluster(tiny_path: Path, tmp_path: Path, pytestconfig: pytest.Config) -> Iterator[Cluster]:
    if not pytestconfig.getoption("--full"):
        pytest.skip("minutes; only with --full")
    from rayseek.serve_app.k8s.rayservice import cell_serve_config

    config = Config.model_validate(
        {
            "model": {"path": str(tiny_path)},
            "api": {"keys": [KEY]},
            "engine": {"cache_gib": 0.01},
            "hardware": {"per_node": 1},
            "ingress": {"host": "127.0.0.1", "port": free_port()},
            "prefill": {"units": 1},
            "transfer": {"min_prompt_tokens": 16},
            "autoscaling": {
                "prefill": {"least": 1, "most": 2},
                "decode": {"least": 1, "most": 2},
                "queue_s": 0.2, "prefill_busy": 0.05, "kv_used": 0.02, "inter_token_s": 5,
                "up_s": 2, "down_s": 10, "drain_s": 2,
            },
        }
    )  # fmt: skip
    file = cell_serve_config(config, layout(config, ModelConfig.from_pretrained(tiny_path)))
    file["proxy_location"] = "HeadOnly"  # all nodes are one machine
    with started(config, tmp_path) as (dashboard, token):
        api = ServeApi(dashboard, token)
        until("the dashboard", lambda: api.application() == {})
        api.deploy(file)
        yield Cluster(api, f"http://127.0.0.1:{config.ingress.port}", dashboard, token)


@contextlib.contextmanager
def started(config: Config, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """A head whose autoscaler makes nodes; its dashboard, and Ray's token."""
    folder = Path(tempfile.mkdtemp(prefix="rs", dir="/tmp"))  # short: it holds sockets
    gcs, dashboard = free_port(), free_port()
    host = subprocess.run(
        [sys.executable, "-c", "import ray; print(ray.util.get_node_ip_address())"],
        capture_output=True, text=True, check=True,
    ).stdout.split()[-1]  # fmt: skip
    types = {
        role: {"resources": {"CPU": 1, "object_store_memory": 10**8}, "labels": {"role": role},
               "node_config": {}, "min_workers": 0, "max_workers": 3}
        for role in ("prefill", "decode")
    }  # fmt: skip
    types[HEAD_TYPE] = {"resources": {"CPU": 2}, "labels": {"role": "ingress"}, "node_config": {},
                     "max_workers": 0}  # fmt: skip
    made = {
        "cluster_name": "rayseek", "max_workers": 6, "idle_timeout_minutes": 0.1,
        "available_node_types": types, "head_node_type": HEAD_TYPE,
        "provider": {
            "type": "external", "launch_multiple": True, "head_node_id": HEAD,
            "disable_node_updaters": True,  # nothing has to be installed
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": f"{host}:{gcs}",
        },
        "auth": {}, "upscaling_speed": 10.0, "file_mounts": {}, "cluster_synced_files": [],
        "initialization_commands": [], "setup_commands": [], "head_setup_commands": [],
        "worker_setup_commands": [], "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }  # fmt: skip
    (tmp_path / "autoscaler.json").write_text(json.dumps(made))
    environment = serve_environment(config, folder)
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block",
         f"--autoscaling-config={tmp_path / 'autoscaler.json'}", f"--temp-dir={folder}/ray",
         f"--port={gcs}", f"--dashboard-port={dashboard}", f"--node-ip-address={host}",
         "--num-cpus=2", "--object-store-memory=100000000", "--labels=role=ingress",
         "--dashboard-agent-listen-port=0", f"--ray-client-server-port={free_port()}"],
        env={**os.environ, **environment, "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1",
             "RAY_CLOUD_INSTANCE_ID": HEAD, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
             "AUTOSCALER_UPDATE_INTERVAL_S": "1"},
    )  # fmt: skip
    try:
        yield f"http://127.0.0.1:{dashboard}", environment["RAY_AUTH_TOKEN"]
    finally:
        process.terminate()
        own = [p for p in psutil.process_iter(["cmdline", "environ"])
               if str(folder) in str(p.info)]  # fmt: skip
        for one in own:
            with contextlib.suppress(psutil.Error):
                one.kill()
        process.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def test_units_and_their_nodes_follow_the_load(cluster: Cluster) -> None:
    """From one unit of each role to two, and back when the load is gone; no stream fails."""
    took = {}
    cluster.api.settle(PATIENCE_S)
    assert cluster.running() == {"Prefill": 1, "Decode": 1, "Ingress": 1}
    assert cluster.nodes() == {"decode": 1, "ingress": 1, "prefill": 1}

    endpoint = Endpoint(cluster.url, KEY, "deepseek-v3", GIVE_UP_S)
    failed: list[str] = []
    stop, done = threading.Event(), [0]

    def ask(number: int) -> None:
        round_ = 0
        while not stop.is_set():
            (request,) = prompts(1, number * 10_000 + round_)  # new to the caches
            round_ += 1
            try:
                assert "".join(stream(endpoint, request))
                done[0] += 1
            except (OSError, RuntimeError) as error:
                failed.append(repr(error))

    until("an answer", lambda: bool("".join(stream(endpoint, prompts(1, 0)[0]))))
    threads = [threading.Thread(target=ask, args=(n,)) for n in range(1, STREAMS + 1)]
    for thread in threads:
        thread.start()
    try:
        wanted = {"Prefill": 2, "Decode": 2, "Ingress": 1}
        took["up"] = until("two units of each role", lambda: cluster.running() == wanted)
        assert cluster.nodes() == {"decode": 2, "ingress": 1, "prefill": 2}
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    wanted = {"Prefill": 1, "Decode": 1, "Ingress": 1}
    took["down"] = until("one unit of each role", lambda: cluster.running() == wanted)
    nodes: dict[str, Any] = {"decode": 1, "ingress": 1, "prefill": 1}
    took["gone"] = until("their nodes are gone", lambda: cluster.nodes() == nodes)
    assert not failed and done[0] > STREAMS, failed[:3]
    print(f"{done[0]} streams; seconds: {took}")
