"""A real uvicorn and real clients: the vendor's samples word for word, slow and rude readers."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI

from rayseek.serve_app.http_methods import accept_methods_in_any_case
from rayseek.serve_app.settings import ApiSettings
from rayseek.serve_app.tokenizer import Tokenizer

# The page of the product that this server stands in for; only the three values are filled in.
PYTHON_SAMPLE = """
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
CURL_SAMPLE = r"""
curl -X Post http://${ServerIP}:8000/v1/chat/completions \
  -H "Content-Type: application/json" \
  -H "Authorization: Bearer ${ApiKey}" \
  -d '{
    "model": "${ModelName}",
    "messages": [
      {
        "role": "user",
        "content": "Write a letter to my daughter from the future year 2035, telling her to study technology well, become the master of technology, and promote technological and economic development; she is currently in 3rd grade"
      }
    ]
  }'
"""  # noqa: E501
TEXT = "I am DeepSeek-V3. 你好！😀"


@contextlib.contextmanager
def serving(api: Any, app: FastAPI) -> Iterator[int]:
    """The port of an app that takes methods as an ingress does."""
    accept_methods_in_any_case()
    with api.serving(app) as url:
        yield int(url.rpartition(":")[2])


@pytest.fixture
def port(api: Any, small: Tokenizer, settings: ApiSettings) -> Iterator[int]:
    with serving(api, api.build_app(settings, small, api.saying(small, TEXT))) as port:
        yield port


def test_vendors_python_sample(api: Any, port: int) -> None:
    sample = PYTHON_SAMPLE.replace("${ApiKey}", api.KEY)
    sample = sample.replace("${ServerUrl}", f"http://127.0.0.1:{port}/v1")
    done = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", sample],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"deepseek-v3\n{TEXT}"


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_vendors_curl_sample(api: Any, port: int) -> None:
    sample = CURL_SAMPLE.replace("${ApiKey}", api.KEY).replace("${ModelName}", "deepseek-v3")
    sample = sample.replace("${ServerIP}:8000", f"127.0.0.1:{port}")
    sample = sample.replace("curl ", "curl -s ", 1)
    done = subprocess.run(
        ["bash", "-c", sample], check=False, capture_output=True, text=True, timeout=120
    )
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == TEXT


def test_methods_in_any_case_on_one_connection(api: Any, port: int) -> None:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
        body = json.dumps({"model": "deepseek-v3", "prompt": "Post office"})
        headers = {"Authorization": f"Bearer {api.KEY}"}
        for method in ("Post", "POST", "post", "pOsT"):  # httpx would send POST each time
            connection.request(method, "/v1/completions", body, headers)
            reply = connection.getresponse()
            assert reply.status == 200 and TEXT in json.loads(reply.read())["choices"][0]["text"]
        for method in ("Get", "HEAD"):
            connection.request(method, "/health")
            reply = connection.getresponse()
            assert reply.status == 200 and bool(reply.read()) is (method == "Get")


def test_openai_sdk(api: Any, port: int) -> None:
    with openai.OpenAI(api_key=api.KEY, base_url=f"http://127.0.0.1:{port}/v1") as client:
        messages: list[Any] = [{"role": "user", "content": "Hi"}]
        whole = client.chat.completions.create(model="deepseek-chat", messages=messages)
        assert whole.choices[0].message.content == TEXT
        stream = client.chat.completions.create(
            model="deepseek-chat", messages=messages, stream=True,
            stream_options={"include_usage": True}, logprobs=True, top_logprobs=1,
        )  # fmt: skip
        chunks = list(stream)
        assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
        assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == TEXT
        plain = client.completions.create(model="deepseek-v3", prompt="a", suffix="b")
        assert plain.choices[0].text == TEXT
        with pytest.raises(openai.BadRequestError, match="top_p"):
            client.chat.completions.create(model="deepseek-v3", messages=messages, top_p=0)
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-4")
    with (
        openai.OpenAI(api_key="sk-no", base_url=f"http://127.0.0.1:{port}/v1") as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


def test_error_within_a_stream_reaches_the_sdk(
    api: Any, small: Tokenizer, settings: ApiSettings
) -> None:
    def broken(request: Any) -> list[Any]:
        return [*api.deltas_of(request, small.encode_text("abc"), [1, 2])[:-1], ValueError("x")]

    with (
        serving(api, api.build_app(settings, small, api.ScriptedEngine(broken))) as port,
        openai.OpenAI(api_key=api.KEY, base_url=f"http://127.0.0.1:{port}/v1") as client,
    ):
        stream = client.chat.completions.create(
            model="deepseek-v3", messages=[{"role": "user", "content": "Hi"}], stream=True
        )
        with pytest.raises(openai.APIError, match="failed to handle"):
            list(stream)


def raw_request(port: int, key: str, **fields: Any) -> socket.socket:
    body = json.dumps({"model": "deepseek-v3", "prompt": "a", **fields}).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # the server feels a reader
    connection.settimeout(120)
    connection.connect(("127.0.0.1", port))
    connection.sendall(
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    return connection


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_request(
    api: Any, small: Tokenizer, settings: ApiSettings, stream: bool
) -> None:
    engine = api.ScriptedEngine(lambda r: [60.0])
    with serving(api, api.build_app(settings, small, engine)) as port:
        connection = raw_request(port, api.KEY, stream=stream)
        wait_until(lambda: engine.live)
        connection.close()
        wait_until(lambda: not engine.live)
        assert len(engine.cancelled) == 1
        assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200


def test_a_client_that_hardly_reads_holds_only_itself(
    api: Any, small: Tokenizer, settings: ApiSettings
) -> None:
    """The slow reader's stream waits; others are served; at the end nothing is missing."""
    settings = ApiSettings(
        "deepseek-v3", 10**6, settings.api_keys, max_output_tokens=10**6,
        default_output_tokens=10**5, keep_alive_s=0.05,
    )  # fmt: skip
    engine = api.ScriptedEngine(
        lambda r: (
            api.deltas_of(r, small.encode_text("y" * 1000) * 20, range(20_000))
            if len(r.prompt_ids) == 2
            else api.deltas_of(r, [small.eos_id])
        )
    )
    with serving(api, api.build_app(settings, small, engine)) as port:
        slow = raw_request(port, api.KEY, stream=True, logprobs=1)  # 7 MB in all
        first = b"".join(slow.recv(1) for _ in range(40))
        assert first.startswith(b"HTTP/1.1 200")
        for _ in range(3):
            with raw_request(port, api.KEY, prompt="longer") as quick:
                assert quick.recv(100).startswith(b"HTTP/1.1 200")
            time.sleep(0.3)
        wait_until(lambda: engine.live == 1)
        received = first
        while not received.endswith(b"0\r\n\r\n"):
            received += slow.recv(2**16)
        slow.close()
        assert len(re.findall(rb'"text":"y"', received)) == 20_000
        assert b"data: [DONE]" in received
