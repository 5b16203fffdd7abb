"""`rayseek serve` on one machine: a private Ray, the Serve application, a clean end.

Nothing here touches another Ray on the machine: own ports, own folders, own session. Settings
that Serve reads from the environment are set before Ray is imported, which is why this file
imports it inside functions.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from rayseek.cluster.config import Config
from rayseek.cluster.precedence import give_way, take_precedence
from rayseek.cluster.traces import ENDPOINT
from rayseek.serve_app.grpc_door import SERVICER_FUNCTIONS
from rayseek.serve_app.settings import ApiSettings

log = logging.getLogger("rayseek.local")

READY_TIMEOUT_S = 1800.0
NODE_STARTS = 3
LOOPBACK = "127.0.0.1"
SERVE_CONNECTIONS = 4096  # of HAProxy, by Serve's default; each takes two open files
# Below those that Linux gives to who asks for any port (from 32768), as Ray does dozens of times
# while it starts: such a one would be taken between a look and its use. Above those of the workers
# of `ray start` (to 19999), and not Serve's of replicas (from 30000).
QUIET_PORTS = range(20_000, 30_000)
_GIVEN: set[int | None] = set()  # in this process; who is to listen there may not do so yet
QUICK_NODE_DEATH = {  # Ray's defaults take half a minute to notice
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "4",
}


class StartError(RuntimeError):
    """The service cannot start here; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Running:
    """A started service."""

    address: str  # http://host:port
    dashboard: str
    dashboard_token: str  # Ray's dashboard asks for it
    logs: Path
    gcs_address: str  # where further nodes find the cluster
    shown_key: str | None = None  # one that may be shown on this machine
    file: dict[str, Any] | None = None  # the Serve config file that it was deployed by


def free_port(preferred: int = 0) -> int:
    """`preferred` if nobody listens there on any interface, else one of QUIET_PORTS, a new one."""
    others = [port for port in random.sample(QUIET_PORTS, 100) if port not in _GIVEN]
    for port in ([preferred] if preferred else []) + others:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("", port))
                _GIVEN.add(port)
                return port
    raise StartError(
        f"no free TCP port among those from {QUIET_PORTS.start} to {QUIET_PORTS.stop - 1}"
    )


def check_port(host: str, port: int) -> None:
    """Raise StartError if the API's port cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise StartError(
                f"cannot listen on {host}:{port}: {error.strerror}. If another server has the "
                f"port, stop it or choose another: rayseek serve --port {port + 1}"
            ) from None


def connections(config: Config, proxies: int) -> int:
    """That one of so many proxies must be able to hold: what its ingress replicas run, at the most
    units, and the longest queue of a key there. A further one would wait, and not hear why."""
    replicas, scale = config.ingress.replicas, config.autoscaling.widest("decode")
    ranks = (scale.most if scale else config.decode.units) * config.decode.attention_ranks
    running = -(-ranks * config.engine_of("decode").max_batch // replicas)
    return max(SERVE_CONNECTIONS, -(-replicas // proxies) * (running + config.api.max_waiting))


def cluster_environment(config: Config, proxies: int | None = None) -> dict[str, str]:
    """What Serve must find in the environment of every process of a cluster, before Ray starts.

    HAProxy and throughput mode: five times less CPU per token than Serve's defaults.
    proxies: that clients come to; None: those of Kubernetes' ingress pods.
    """
    longest = config.ingress.longest_stream_s
    proxies = proxies or config.kubernetes.ingress_pods
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # Who does not answer health checks is ended at once: it would not hear a goodbye either.
        "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
        # Who is killed and hangs is ended after this. Ray's 5 s are for a goodbye; ours need none.
        "RAY_kill_worker_timeout_milliseconds": "500",
        # Ray places one group after the other, and waits for the answer of a node that hangs or has
        # lost its power: by default five minutes and two more. Its servers ask as often as this.
        "RAY_grpc_client_keepalive_time_ms": "10000",
        "RAY_grpc_client_keepalive_timeout_ms": "10000",
        # Then a call waits until the node is known to be dead, which is looked up after 1, 2, 4 ...
        # 60 s, by each call of those that wait in turn.
        "RAY_raylet_rpc_server_reconnect_timeout_max_s": "2",
        "RAY_core_worker_rpc_server_reconnect_timeout_max_s": "2",
        # A proxy takes longer than Serve's 5 s to start on half a CPU, and would be started anew.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        # Three failed checks and a proxy is replaced: a dead one soon, and nothing answers until
        # then (28 s by Serve's periods of 10 s, 5 so); one that hangs has as long as by default.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "20",
        "RAY_SERVE_HAPROXY_MAXCONN": str(connections(config, proxies)),
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(longest),
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(longest),
        "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": str(longest),
        **({ENDPOINT: config.traces.endpoint} if config.traces.endpoint else {}),
    }


def serve_environment(config: Config, folder: Path) -> dict[str, str]:
    """The environment of this machine's own cluster. HAProxy's files and ports are private, since
    its defaults are shared by all of a machine's clusters."""
    _GIVEN.update((config.ingress.port, config.ingress.grpc_port))
    return cluster_environment(config, proxies=1) | {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray listens on every interface whatever it is told: only who knows the token may use it.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }


@contextlib.contextmanager
def running(
    config: Config,
    model_path: Path,
    settings: ApiSettings,
    nodes: int = 1,
    deployed: Config | None = None,
) -> Iterator[Running]:
    """Start Ray and the application, wait until it answers, and take everything down at the end.

    nodes: Ray nodes, all on this machine; several are for trying what the death of one does.
    deployed: a config with model and keys, to be deployed by a Serve config file as on a cluster,
    instead of `model_path` and `settings`.
    Raises StartError when it cannot start.
    """
    check_port(config.ingress.host, config.ingress.port)
    if config.ingress.grpc_port is not None:
        check_port(config.ingress.host, config.ingress.grpc_port)
    folder = Path(tempfile.mkdtemp(prefix="rayseek-", dir="/tmp"))  # short: it holds sockets
    os.environ.update(serve_environment(config, folder))
    if nodes > 1 and deployed is None:  # else as on a cluster
        os.environ.update(QUICK_NODE_DEATH)
    give_way()
    import ray
    from ray import serve

    from rayseek.serve_app.application import serve_config
    from rayseek.serve_app.changes import ServeApi
    from rayseek.serve_app.deploy import APP_NAME, build

    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # the user is told what matters
    terminated = signal.getsignal(signal.SIGTERM)
    try:
        context: Any = ray.init(
            address="local",
            include_dashboard=True,
            dashboard_host=LOOPBACK,
            dashboard_port=free_port(8265),
            num_cpus=max(4, os.cpu_count() or 1),
            object_store_memory=100 * 2**20,  # nothing of ours goes through the object store
            log_to_driver=False,
            logging_level=logging.WARNING,
            _temp_dir=str(folder / "ray"),
        )
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, terminated)  # by Ray's, this would end without its end
        gcs_address = context.address_info["gcs_address"]
        for _ in range(nodes - 1):
            add_node(gcs_address)
        _start_proxy(config)
        logs = folder / "ray" / "session_latest" / "logs"
        dashboard = f"http://{context.dashboard_url}"
        file = None
        if deployed is not None:
            file = serve_config(deployed)
            api = ServeApi(dashboard, os.environ["RAY_AUTH_TOKEN"])
            api.deploy(file)
            api.settle(READY_TIMEOUT_S)
        else:
            settings = replace(settings, dashboard_url=settings.dashboard_url or dashboard)
            whole = build(config, model_path, settings, rank_host=LOOPBACK, head_ingress=nodes > 1)
            serve.run(whole, name=APP_NAME, route_prefix="/")
        host = LOOPBACK if config.ingress.host in ("0.0.0.0", "::") else config.ingress.host
        address = f"http://{host}:{config.ingress.port}"
        _wait_until_ready(f"{address}/ready")
        token = os.environ["RAY_AUTH_TOKEN"]
        yield Running(address, dashboard, token, logs, gcs_address, file=file)
    finally:
        with _uninterrupted():
            started = psutil.Process().children(recursive=True)
            ray.shutdown()  # ends every process; serve.shutdown would drain for half a minute
            _, left = psutil.wait_procs(started, timeout=10)
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            shutil.rmtree(folder, ignore_errors=True)
            take_precedence()


def _start_proxy(config: Config) -> None:
    """Start Serve with its proxy on the cluster's first node.

    Raises StartError if the proxy ends while it starts.
    """
    from ray import exceptions, serve

    host, port, grpc_port = config.ingress.host, config.ingress.port, config.ingress.grpc_port
    grpc_options = {"port": grpc_port, "grpc_servicer_functions": SERVICER_FUNCTIONS}
    try:
        # Serve waits less for a proxy than a busy machine takes; `/ready` will say when it is up.
        with contextlib.suppress(TimeoutError, exceptions.ActorDiedError):
            serve.start(
                proxy_location="HeadOnly",  # all nodes that this starts are one machine
                http_options={"host": host, "port": port},
                grpc_options=grpc_options if grpc_port is not None else None,
                logging_config={"log_level": "WARNING"},
            )
    except exceptions.RayTaskError as error:
        raise StartError(f"Serve's proxy does not start: {error.cause}") from None


def add_node(gcs_address: str) -> None:
    """Another Ray node on this machine: a raylet with ports of its own, below this process.

    Returns when it is there. Its ports may be taken while it starts; then it ends, and another is
    started. Raises StartError after a few.
    """
    import ray

    def there() -> set[str]:
        return {node["NodeID"] for node in ray.nodes() if node["Alive"]}

    before = there()
    for _ in range(NODE_STARTS):
        command = [
            str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats",
            f"--address={gcs_address}", "--num-cpus=4", f"--object-store-memory={100 * 2**20}",
            f"--dashboard-agent-listen-port={free_port()}",
        ]  # fmt: skip
        node = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while node.poll() is None:
            if there() - before:
                return
            time.sleep(0.2)
    raise StartError(f"a Ray node ended {NODE_STARTS} times while it started; see Ray's logs")


def _wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        with (
            contextlib.suppress(OSError),  # a refusal, a 503, a reset while the proxy starts
            urllib.request.urlopen(url, timeout=60) as answer,
        ):
            if answer.status == 200:
                return
        time.sleep(0.2)
    raise StartError(f"{url} did not answer within {READY_TIMEOUT_S:.0f} s")


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """A second Ctrl-C must not leave half of the processes behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
