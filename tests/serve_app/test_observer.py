"""What is noted of requests: the same counts as in `usage`, how they ended, which key; and nothing
of what they said."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest

from rayseek.cluster.metrics import INGRESS, short
from rayseek.cluster.request import RequestRefused
from rayseek.serve_app import observer as observing
from rayseek.serve_app.observer import Observer
from rayseek.serve_app.service import Service
from rayseek.serve_app.settings import ApiSettings
from rayseek.serve_app.tokenizer import Tokenizer

KINDS = {short(m): m for m in INGRESS}
ASK = {"model": "deepseek-v3", "messages": [{"role": "user", "content": "A secret question"}]}


class Book:
    """A meter that checks names and labels against the list."""

    def __init__(self) -> None:
        self.values: dict[str, list[tuple[float, dict[str, str]]]] = defaultdict(list)

    def note(self, kind: str, name: str, value: float, labels: dict[str, str]) -> None:
        assert KINDS[name].kind == kind and set(labels) == set(KINDS[name].labels), name
        self.values[name].append((value, labels))

    def add(self, name: str, amount: float, **labels: str) -> None:
        self.note("counter", name, amount, labels)

    def set(self, name: str, value: float, **labels: str) -> None:
        self.note("gauge", name, value, labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        self.note("histogram", name, value, labels)

    def total(self, name: str, **labels: str) -> float:
        return sum(v for v, have in self.values[name] if labels.items() <= have.items())


@pytest.fixture
def book() -> Book:
    return Book()


def serve(api: Any, settings: ApiSettings, small: Tokenizer, engine: Any, book: Book) -> Any:
    service = Service(settings, small, engine, observer=Observer(book))
    return api.client_of(api.build_app(settings, small, engine, service))


async def test_counts_are_those_of_usage(
    api: Any, settings: ApiSettings, small: Tokenizer, book: Book, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "rayseek.requests")
    async with serve(api, settings, small, api.saying(small, "Answer", cached=2), book) as client:
        said = (await client.post("/v1/chat/completions", json={**ASK, "n": 3})).json()
        assert (await client.get("/nowhere")).status_code == 404
        assert (await client.post("/chat/completions", json={})).status_code == 400
        assert (
            await client.post("/v1/chat/completions", json=ASK, headers={"authorization": "no"})
        ).status_code == 401
    assert book.total("prompt_tokens") == said["usage"]["prompt_tokens"]
    assert book.total("cached_prompt_tokens") == said["usage"]["prompt_cache_hit_tokens"]
    # The token that ends an answer was made as well.
    assert book.total("generation_tokens") == said["usage"]["completion_tokens"] + 3
    assert book.total("requests", finish="stop") == book.total("requests") == 3
    assert len(book.values["time_to_first_token_seconds"]) == 3
    routes = [(labels["route"], labels["status"]) for _, labels in book.values["http_responses"]]
    assert routes == [
        ("/v1/chat/completions", "200"), ("unknown", "404"), ("/chat/completions", "400"),
        ("/v1/chat/completions", "401"),
    ]  # fmt: skip
    lines = [r.__dict__["fields"] for r in caplog.records if r.name == "rayseek.requests"]
    assert [line["request"].removesuffix(f"-{n}") for n, line in enumerate(lines)] == [
        said["id"]
    ] * 3
    whole = json.dumps(lines)
    assert "secret" not in whole and "Answer" not in whole and api.KEY not in whole


@pytest.mark.parametrize(
    ("step", "finish", "status"),
    [
        (RequestRefused("the queue is full"), "refused", 503),
        (RuntimeError("broken"), "error", 500),
    ],
)
async def test_failures(
    api: Any, settings: ApiSettings, small: Tokenizer, book: Book, step: Exception, finish: str,
    status: int, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    engine = api.ScriptedEngine(lambda r: [step])
    async with serve(api, settings, small, engine, book) as client:
        answer = await client.post("/v1/chat/completions", json=ASK)
    assert answer.status_code == status
    assert book.total("requests", finish=finish) == book.total("requests") == 1
    assert not book.values["time_to_first_token_seconds"]
    noted = [r for r in caplog.records if r.name == "rayseek.requests"]
    assert [r.levelname for r in noted] == ["WARNING"]


async def test_who_leaves_and_who_waits(
    api: Any, settings: ApiSettings, small: Tokenizer, book: Book
) -> None:
    """A client that goes is `closed`; load tells who runs and who waits."""
    engine = api.ScriptedEngine(lambda r: [*api.deltas_of(r, [30] * 50, range(50))[:3], 60.0])
    service = Service(replace(settings, in_flight=1), small, engine, observer=Observer(book))
    async with api.client_of(api.build_app(settings, small, engine, service)) as client:
        asks = [
            asyncio.create_task(client.post("/v1/chat/completions", json=ASK)) for _ in range(3)
        ]
        while service.load != (1, 2):
            await asyncio.sleep(0.01)
        for ask in asks:
            ask.cancel()
        await asyncio.gather(*asks, return_exceptions=True)
        while service.load != (0, 0):
            await asyncio.sleep(0.01)
    assert book.total("requests", finish="closed") == 3


def test_keys_are_bounded(book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observing, "MOST_KEYS", 2)
    observer = Observer(book)
    assert [observer._label(k) for k in "abcab"] == ["a", "b", "other", "a", "b"]


async def test_cluster_document(api: Any, settings: ApiSettings, small: Tokenizer) -> None:
    """For those with a key; leaders are asked once by many who look."""
    asked = 0

    async def views() -> list[Any]:
        nonlocal asked
        asked += 1
        return []

    engine = api.saying(small)
    service = Service(settings, small, engine, lambda: ["a rank is missing"])
    app = api.build_app(settings, small, engine, service, views)
    async with api.client_of(app, key=None) as stranger:
        assert (await stranger.get("/api/cluster")).status_code == 401
    async with api.client_of(app) as client:
        answers = await asyncio.gather(*(client.get("/api/cluster") for _ in range(5)))
    assert asked == 1
    said = answers[0].json()
    assert said["problems"] == ["a rank is missing"] and said["units"] == []
    assert (said["running"], said["waiting"]) == (0, 0)
    assert answers[0].headers["cache-control"] == "no-store"
