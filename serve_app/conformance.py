"""`rayseek conformance URL`: does an endpoint speak the V3 dialect? A score card by area.

This file is the frame: HTTP by the standard library, the `check` decorator, the card. The checks
stand in `conformance_chat.py`, `_text.py` and `_form.py`. They are about form, so that a model of
random weights can pass: the shape of answers, and that a stream says what the plain answer says.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

AREAS = (
    "chat", "stream", "tools", "json", "fim", "prefix", "logprobs", "usage", "errors", "injection",
)  # fmt: skip
TIMEOUT_S = 120.0
Json = dict[str, Any]


class Unmet(Exception):
    """What was seen instead."""


def require(met: object, seen: object) -> None:
    """`seen` is told when the requirement is not met."""
    if not met:
        text = seen if isinstance(seen, str) else json.dumps(seen, ensure_ascii=False, default=repr)
        raise Unmet(text if len(text) <= 400 else text[:397] + "...")


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes

    @property
    def document(self) -> Json:
        """The JSON object of the body; Unmet if it is none."""
        try:
            document = json.loads(self.body)
        except ValueError:
            document = None
        require(isinstance(document, dict), f"{self.status}, no JSON object: {self.body[:200]!r}")
        assert isinstance(document, dict)
        return document

    def answer(self) -> Json:
        """The document of a success."""
        require(self.status == 200, f"status {self.status}: {self.body[:300]!r}")
        return self.document

    def chunks(self) -> list[Json]:
        """The chunks of a stream that came to its end; its frame is judged here."""
        require(self.status == 200, f"status {self.status}: {self.body[:300]!r}")
        kind = self.headers.get("content-type", "")
        require(kind.startswith("text/event-stream"), f"content-type {kind!r}")
        events = [event for event in self.body.decode().split("\n\n") if event]
        events = [event for event in events if not event.startswith(":")]
        require(events and events[-1] == "data: [DONE]", f"no [DONE] at the end: {events[-1:]}")
        wrong = [event for event in events if not event.startswith("data: ")]
        require(not wrong, f"an event without data: {wrong[:1]}")
        return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]

    def error(self, *statuses: int) -> Json:
        """The error object of a refusal with one of `statuses`; its shape is judged here."""
        require(self.status in statuses, f"status {self.status}: {self.body[:200]!r}")
        error = self.document.get("error")
        require(isinstance(error, dict), self.document)
        assert isinstance(error, dict)
        require({"message", "type", "param", "code"} <= error.keys(), error)
        require(isinstance(error["message"], str) and error["message"], error)
        return error


def base_of(url: str) -> str:
    """An API's address without /v1 at its end, and with http:// where no scheme is given."""
    full = url if "//" in url else f"http://{url}"
    return full.rstrip("/").removesuffix("/v1").rstrip("/")


class Endpoint:
    """An API under test. Paths are given below its base, which ends in /v1 or in nothing."""

    def __init__(
        self, url: str, key: str, model: str | None = None, timeout_s: float = TIMEOUT_S
    ) -> None:
        """Raises OSError or Unmet when the models cannot be listed, to learn the default one."""
        self.base = base_of(url)
        parts = urlsplit(self.base)
        self._secure, self._host, self._root = parts.scheme == "https", parts.netloc, parts.path
        self._key, self._timeout_s = key, timeout_s
        self.model = model or self._first_model()

    def _first_model(self) -> str:
        models = self.get("/v1/models").answer().get("data")
        require(isinstance(models, list) and models, "GET /v1/models lists no model")
        assert isinstance(models, list)
        return str(models[0]["id"])

    def get(self, path: str, key: str | None = None) -> Reply:
        return self._exchange("GET", path, b"", key)

    def post(self, path: str, body: Json | bytes, key: str | None = None) -> Reply:
        """`body` gets the model's name unless it has one."""
        if isinstance(body, dict):
            body = json.dumps({"model": self.model, **body}).encode()
        return self._exchange("POST", path, body, key)

    def chat(self, messages: str | Sequence[Json], **fields: Any) -> Reply:
        """A short, greedy chat request; a string is one user message."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        body = {"messages": messages, "temperature": 0, "seed": 7, "max_tokens": 24, **fields}
        return self.post("/v1/chat/completions", body)

    def complete(self, path: str = "/v1/completions", **fields: Any) -> Reply:
        """A short, greedy text completion."""
        return self.post(path, {"temperature": 0, "seed": 7, "max_tokens": 24, **fields})

    def _exchange(self, method: str, path: str, body: bytes, key: str | None) -> Reply:
        with self.opened(method, path, body, key) as reply:
            named = {name.lower(): value for name, value in reply.getheaders()}
            return Reply(reply.status, named, reply.read())

    @contextlib.contextmanager
    def opened(
        self, method: str, path: str, body: bytes, key: str | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        """An answer whose body is still to come."""
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        headers = {"Content-Type": "application/json"}
        if key := self._key if key is None else key:
            headers["Authorization"] = f"Bearer {key}"
        connection = kind(self._host, timeout=self._timeout_s)
        try:
            connection.request(method, self._root + path, body or None, headers)
            yield connection.getresponse()
        finally:
            connection.close()


def open_endpoint(url: str, key: str, model: str | None) -> Endpoint:
    """An endpoint that has answered. Raises ValueError."""
    try:
        return Endpoint(url, key, model)
    except (Unmet, OSError, http.client.HTTPException) as error:
        raise ValueError(f"cannot list the models of {url}: {error}") from None


@dataclass(frozen=True, slots=True)
class Check:
    id: str  # "area.what"
    sentence: str
    run: Callable[[Endpoint], None]

    @property
    def area(self) -> str:
        return self.id.partition(".")[0]


CHECKS: list[Check] = []


def check(id: str, sentence: str) -> Callable[[Callable[[Endpoint], None]], Check]:
    """Make a function a check: it returns when `sentence` holds and raises Unmet otherwise."""

    def register(run: Callable[[Endpoint], None]) -> Check:
        made = Check(id, sentence, run)
        assert made.area in AREAS and all(other.id != id for other in CHECKS), id
        CHECKS.append(made)
        return made

    return register


def all_checks() -> list[Check]:
    from rayseek.serve_app import conformance_chat, conformance_form, conformance_text

    # Importing them registers their checks.
    assert conformance_chat and conformance_form and conformance_text
    return sorted(CHECKS, key=lambda made: AREAS.index(made.area))


@dataclass(frozen=True, slots=True)
class Result:
    check: Check
    seen: str | None  # what was seen instead; None: passed


def run_check(made: Check, at: Endpoint) -> Result:
    try:
        made.run(at)
    except Unmet as unmet:
        return Result(made, str(unmet))
    except (OSError, http.client.HTTPException) as error:
        return Result(made, f"the connection failed: {error!r}")
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        return Result(made, f"an answer of another shape: {error!r}")
    return Result(made, None)


def score_card(results: Sequence[Result]) -> str:
    lines = []
    for area in AREAS:
        mine = [result for result in results if result.check.area == area]
        passed = sum(result.seen is None for result in mine)
        lines.append(
            f"{area:<10} {passed:>3} of {len(mine):<3} {'' if passed == len(mine) else '✗'}"
        )
        for result in mine:
            if result.seen is not None:
                lines.append(f"    {result.check.id}: {result.check.sentence}")
                lines += textwrap.wrap(f"seen: {result.seen}", 96, **INDENT)
    passed = sum(result.seen is None for result in results)
    lines.append(f"{'all':<10} {passed:>3} of {len(results):<3} {100 * passed // len(results)} %")
    return "\n".join(line.rstrip() for line in lines)


INDENT: Any = {"initial_indent": " " * 6, "subsequent_indent": " " * 12}


def conformance(url: str, key: str, model: str | None) -> bool:
    """Run every check against `url`, print the card. True: all passed. Raises ValueError."""
    at = open_endpoint(url, key, model)
    results = [run_check(made, at) for made in all_checks()]
    print(score_card(results))
    return all(result.seen is None for result in results)
