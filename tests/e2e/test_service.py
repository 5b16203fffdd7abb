"""The whole service as a user starts it: `rayseek serve`, HTTP, kill -9, Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from openai import AsyncOpenAI, OpenAI
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from rayseek.cluster.metrics import METRICS, SERVE_LABELS
from rayseek.serve_app.chat_pb2 import ChatChunk, ChatRequest, Message
from rayseek.serve_app.local import free_port

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
RAYSEEK = [sys.executable, "-m", "rayseek.serve_app"]


@dataclass
class Service:
    process: subprocess.Popen[str]
    url: str
    key: str
    environment: dict[str, str]
    port: int
    grpc_port: int
    dashboard: str
    token: str

    @property
    def base(self) -> str:
        return f"{self.url}/v1"

    def find(self, actor: str) -> psutil.Process:
        """The process of a Ray actor, by the title that Ray gives it."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if actor in " ".join(process.cmdline()):
                    return process
        raise AssertionError(f"no process of {actor}")

    def has_another(self, pid: int, actor: str) -> bool:
        """Whether a process of this actor runs that is not `pid`."""
        with contextlib.suppress(AssertionError):
            return self.find(actor).pid != pid
        return False


class Collector:
    """An OpenTelemetry collector; `spans`: process and span name, by trace."""

    def __init__(self) -> None:
        self.spans: dict[str, set[tuple[str, str]]] = defaultdict(set)
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                collector.took(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def took(self, export: ExportTraceServiceRequest) -> None:
        for of_process in export.resource_spans:
            about = {a.key: a.value.string_value for a in of_process.resource.attributes}
            for spans in of_process.scope_spans:
                for span in spans.spans:
                    where = about["service.instance.id"]
                    self.spans[span.trace_id.hex()].add((where.split("-")[0], span.name))


COLLECTOR = Collector()


def start(model: Path, home: Path) -> Service:
    environment = {
        **os.environ, "XDG_CONFIG_HOME": str(home / "config"), "PYTHONUNBUFFERED": "1",
        "HOME": str(home), "OTEL_BSP_SCHEDULE_DELAY": "300",
    }  # fmt: skip
    port, grpc_port = free_port(), free_port()
    config = home / "config.yaml"
    endpoint = f"http://127.0.0.1:{COLLECTOR.server.server_port}"
    config.write_text(
        f"ingress: {{grpc_port: {grpc_port}, host: 127.0.0.1}}\n"
        f"traces: {{endpoint: '{endpoint}'}}\n"
    )
    process = subprocess.Popen(
        [*RAYSEEK, "serve", str(config), "--model", str(model), "--port", str(port)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if "Ctrl-C" in line:
            break
    assert "Ctrl-C" in said, said
    key = re.search(r"sk-\w+", said)
    url = re.search(r"(http://\S+)/v1", said)
    dashboard = re.search(r"(http://\S+)  \(token (\w+)\)", said)
    assert key and url and dashboard, said
    return Service(process, url[1], key[0], environment, port, grpc_port, *dashboard.groups())


def lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.fixture(scope="session")
def service(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    running = start(tiny_path, tmp_path_factory.mktemp("home"))
    children = psutil.Process(running.process.pid).children(recursive=True)
    yield running
    running.process.send_signal(signal.SIGTERM)  # as Ctrl-C, but Ray has a handler of its own
    said, _ = running.process.communicate(timeout=120)
    assert running.process.returncode == 0 and said.endswith("Stopped.\n"), said
    deadline = time.monotonic() + 20  # a kill takes a moment
    while (left := [c for c in children if lives(c)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, f"SIGTERM left {left}"
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", running.port), timeout=1).close()


VENDOR_SAMPLE = """
from openai import OpenAI

##### API Configuration #####
openai_api_key = "${ApiKey}"
openai_api_base = "${ServerUrl}"

client = OpenAI(
    api_key=openai_api_key,
    base_url=openai_api_base,
)

models = client.models.list()
model = models.data[0].id
print(model)


def main():
    stream = True

    chat_completion = client.chat.completions.create(
        messages=[
            {
                "role": "user",
                "content": [
                    {
                        "type": "text",
                        "text": "Hello, please introduce yourself in as much detail as possible.",
                    }
                ],
            }
        ],
        model=model,
        max_completion_tokens=1024,
        stream=stream,
    )

    if stream:
        for chunk in chat_completion:
            print(chunk.choices[0].delta.content, end="")
    else:
        result = chat_completion.choices[0].message.content
        print(result)


if __name__ == "__main__":
    main()
"""


def test_vendor_python_sample_verbatim(service: Service) -> None:
    sample = VENDOR_SAMPLE.replace("${ApiKey}", service.key).replace("${ServerUrl}", service.base)
    done = subprocess.run(
        [sys.executable, "-c", sample], capture_output=True, timeout=120, check=True
    )
    model, _, text = done.stdout.decode().partition("\n")
    assert model == "deepseek-v3"
    assert len(text) > 100


def test_grpc_says_what_http_says(service: Service) -> None:
    """Through Serve's gRPC proxy, with the standard health service beside."""
    request = ChatRequest(
        model="deepseek-v3", messages=[Message(role="user", content="Hi")], max_tokens=16, seed=3
    )
    with (
        OpenAI(api_key=service.key, base_url=service.base) as client,
        grpc.insecure_channel(f"127.0.0.1:{service.grpc_port}") as channel,
    ):
        said = client.chat.completions.create(
            model="deepseek-v3", messages=[{"role": "user", "content": "Hi"}], max_tokens=16, seed=3
        )
        stream = channel.unary_stream(
            "/rayseek.v1.ChatService/ChatStream", ChatRequest.SerializeToString,
            ChatChunk.FromString,
        )  # fmt: skip
        metadata = (("authorization", f"Bearer {service.key}"),)
        chunks = list(stream(request, metadata=metadata, timeout=60))
        assert "".join(chunk.content for chunk in chunks) == said.choices[0].message.content
        assert chunks[-1].finish_reason == said.choices[0].finish_reason
        with pytest.raises(grpc.RpcError) as refused:
            list(stream(request, timeout=60))
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        health = HealthStub(channel).Check(HealthCheckRequest(), timeout=60)
        assert health.status == HealthCheckResponse.SERVING


def test_vendor_curl_sample_verbatim(service: Service) -> None:
    """It sends the method as `Post`."""
    body = {
        "model": "deepseek-v3",
        "messages": [{"role": "user", "content": "Write a letter to my daughter from the future "
                      "year 2035, telling her to study technology well"}],
    }  # fmt: skip
    done = subprocess.run(
        ["curl", "-sS", "-X", "Post", f"{service.base}/chat/completions",
         "-H", "Content-Type: application/json", "-H", f"Authorization: Bearer {service.key}",
         "-d", json.dumps(body)],
        capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    answer = json.loads(done.stdout)
    assert answer["choices"][0]["message"]["role"] == "assistant"
    usage = answer["usage"]
    assert (
        usage["prompt_cache_hit_tokens"] + usage["prompt_cache_miss_tokens"]
        == usage["prompt_tokens"]
    )


def test_conformance(service: Service) -> None:
    """Every check of the public suite, against the real engine with random weights."""
    done = subprocess.run(
        [*RAYSEEK, "conformance", service.base, f"--key={service.key}"],
        check=False, capture_output=True, text=True, timeout=600, env=service.environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("100 %\n") and "✗" not in done.stdout


def test_a_trace_goes_through_all_processes(service: Service) -> None:
    trace = os.urandom(16).hex()
    answer = httpx.post(
        f"{service.base}/completions",
        json={"model": "deepseek-v3", "prompt": "a b", "max_tokens": 4, "ignore_eos": True},
        headers={
            "Authorization": f"Bearer {service.key}", "traceparent": f"00-{trace}-{'1' * 16}-01"
        },
        timeout=60,
    )  # fmt: skip
    assert answer.status_code == 200, answer.text
    seen = COLLECTOR.spans[trace]
    deadline = time.monotonic() + 60
    while len(seen) < 6 and time.monotonic() < deadline:
        time.sleep(0.1)
    ingress = {name for where, name in seen if where == "ingress"}
    assert ingress == {"POST /v1/completions", "sequence", "queue", "first token"}
    assert {name for where, name in seen if where != "ingress"} == {"prefill", "decode"}


def test_key_file_is_private(service: Service) -> None:
    file = Path(service.environment["XDG_CONFIG_HOME"]) / "rayseek" / "api_key"
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.read_text().strip() == service.key


def test_ray_asks_for_its_token(service: Service) -> None:
    """Ray's processes listen on every interface: who has no token gets nothing from them."""
    url = f"{service.dashboard}/api/serve/applications/"
    assert httpx.get(url, timeout=60).status_code == 401
    token = {"Authorization": f"Bearer {service.token}"}
    assert httpx.get(url, headers=token, timeout=60).status_code == 200


def test_second_start_on_the_same_port_says_so(service: Service, tiny_path: Path) -> None:
    done = subprocess.run(
        [*RAYSEEK, "serve", "--model", str(tiny_path), "--port", str(service.port),
         "--host", "127.0.0.1"],
        check=False, capture_output=True, text=True, timeout=120, env=service.environment,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{service.port}" in done.stderr
    assert "--port" in done.stderr


def ask(seed: int, **more: Any) -> dict[str, Any]:
    return {
        "model": "deepseek-v3",
        "messages": [{"role": "user", "content": f"Count from {seed} to one hundred."}],
        "seed": seed,
        "temperature": 1.2,
        "max_tokens": 300,
        "extra_body": {"ignore_eos": True},
        **more,
    }


async def streamed(client: AsyncOpenAI, seed: int, pieces: list[str] | None = None) -> str:
    pieces = [] if pieces is None else pieces
    finish = None
    async for chunk in await client.chat.completions.create(**ask(seed), stream=True):
        text = chunk.choices[0].delta.content
        assert text is not None, "clients print it unseen"
        pieces.append(text)
        finish = chunk.choices[0].finish_reason or finish
        if finish:
            usage = chunk.usage
    assert finish == "length"
    assert usage is not None and usage.completion_tokens == 300
    return "".join(pieces)


async def test_streams_equal_plain_answers(service: Service) -> None:
    """Law 1 and law 2 through every layer: streamed together, answered one by one."""
    async with AsyncOpenAI(api_key=service.key, base_url=service.base) as client:
        together = await asyncio.gather(*(streamed(client, seed) for seed in range(8)))
        for seed, text in enumerate(together):
            plain = await client.chat.completions.create(**ask(seed), stream=False)
            assert plain.choices[0].message.content == text


RANK, LEADER = "ray::Rank", "ray::ServeReplica:rayseek:Decode"


@pytest.mark.parametrize(
    ("victim", "number", "progress"),
    [
        pytest.param(RANK, signal.SIGKILL, 0, id="rank killed at the start"),
        pytest.param(RANK, signal.SIGKILL, 20, id="rank killed in the middle"),
        pytest.param(RANK, signal.SIGSTOP, 20, id="rank hangs"),
        pytest.param(LEADER, signal.SIGKILL, 20, id="unit's leader killed"),
    ],
)
async def test_no_death_changes_a_stream(
    service: Service, victim: str, number: signal.Signals, progress: int
) -> None:
    """Law 3, with 16 streams: every one completes with the text of an undisturbed run."""
    async with AsyncOpenAI(
        api_key=service.key, base_url=service.base, max_retries=0, timeout=200
    ) as client:
        undisturbed = await asyncio.gather(*(streamed(client, seed) for seed in range(16)))
        process = service.find(victim)  # the search takes time in which streams would end
        pieces: list[list[str]] = [[] for _ in range(16)]
        runs = [asyncio.create_task(streamed(client, s, pieces[s])) for s in range(16)]
        while min(map(len, pieces)) < progress:
            await asyncio.sleep(0.005)
        process.send_signal(number)
        assert not all(run.done() for run in runs), "too late to mean anything"
        assert await asyncio.gather(*runs) == undisturbed
        async with asyncio.timeout(120):  # a dead leader's rank may have brought them to their end
            while not await asyncio.to_thread(service.has_another, process.pid, victim):
                await asyncio.sleep(0.1)


async def test_a_stopped_client_is_cancelled_and_a_slow_one_served(service: Service) -> None:
    body = json.dumps({**ask(1, stream=True), "ignore_eos": True}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {service.key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port, limit=2**22)
    writer.write(head + body)
    await reader.read(300)
    writer.transport.abort()  # gone in the middle

    reader, writer = await asyncio.open_connection("127.0.0.1", service.port, limit=2**22)
    writer.write(head + body)
    for _ in range(4):  # one byte at a time, while others are answered at full speed
        assert await reader.read(1)
        async with AsyncOpenAI(api_key=service.key, base_url=service.base) as client:
            await client.chat.completions.create(**ask(2), stream=False)
    rest = await reader.readuntil(b"data: [DONE]")
    assert b'"finish_reason":"length"' in rest
    writer.close()
    await writer.wait_closed()


def test_bad_input_through_the_proxy(service: Service) -> None:
    """The whole list is tested at the application; here, what the layers before it could spoil."""
    auth = {"Authorization": f"Bearer {service.key}", "Content-Type": "application/json"}
    with httpx.Client(base_url=service.base, headers=auth, timeout=60) as client:
        for content, status in [
            (b'{"model": ', 400),
            (b"\xff\xfe", 400),
            (b'"' + b"x" * 10 * 2**20 + b'"', 413),
            (json.dumps({"model": "deepseek-v3", "messages": []}).encode(), 400),
        ]:
            answer = client.post("/chat/completions", content=content)
            assert answer.status_code == status, answer.text
            assert answer.json()["error"]["message"]
        assert client.post("/nowhere").status_code == 404
        wrong = client.get("/models", headers={"Authorization": "Bearer sk-wrong"})
        assert wrong.status_code == 401
        assert wrong.json()["error"]["type"] == "authentication_error"
        assert client.get(f"{service.url}/health").status_code == 200
        assert client.get(f"{service.url}/ready").status_code == 200


def test_prometheus_finds_metrics_under_the_names_that_dashboards_use(service: Service) -> None:
    """Scraped from the targets that Ray names: every name and label is one of the list's."""
    with OpenAI(api_key=service.key, base_url=service.base) as client:
        client.chat.completions.create(**ask(3, max_tokens=4))
    token = {"Authorization": f"Bearer {service.token}"}
    listed = {name: metric for metric in METRICS for name in metric.exported}
    wanted = {  # one of each kind, and a unit's
        f"ray_rayseek_{name}"
        for name in ("generation_tokens_total", "requests_running", "unit_ranks",
                     "time_to_first_token_seconds_bucket")
    }  # fmt: skip
    found: dict[str, set[str]] = {}
    deadline = time.monotonic() + 120  # Ray's agents hear of news every 10 s
    while time.monotonic() < deadline and not wanted <= found.keys():
        time.sleep(1)
        discovered = httpx.get(f"{service.dashboard}/api/prometheus/sd", headers=token, timeout=60)
        for target in {t for group in discovered.json() for t in group["targets"]}:
            with contextlib.suppress(httpx.HTTPError):  # not every process of Ray's serves any
                for line in httpx.get(f"http://{target}/metrics").text.splitlines():
                    if series := re.match(r"(ray_rayseek_\w+)\{(.*)\} ", line):
                        labels = re.findall(r'(\w+)="', series[2])
                        found.setdefault(series[1], set()).update(labels)
    assert wanted <= found.keys() <= listed.keys()
    for name, labels in found.items():
        assert {*listed[name].labels, *SERVE_LABELS} <= labels, name


def test_too_long_a_prompt_is_refused_and_the_server_lives(service: Service) -> None:
    with OpenAI(api_key=service.key, base_url=service.base, max_retries=0) as client:
        with pytest.raises(Exception, match="maximum context length") as refused:
            client.chat.completions.create(
                model="deepseek-v3", messages=[{"role": "user", "content": "word " * 9000}]
            )
        assert getattr(refused.value, "status_code", None) == 400
        again = client.chat.completions.create(**ask(3, max_tokens=4))
        assert again.usage is not None and again.usage.completion_tokens == 4
