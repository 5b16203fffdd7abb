"""A kept answer is recognised however it was kept, and its first difference is found."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from rayseek.serve_app import replay as module
from rayseek.serve_app.cli import main
from rayseek.serve_app.conformance import Reply
from rayseek.serve_app.replay import differences, read_answer, replay
from rayseek.serve_app.settings import ApiSettings
from rayseek.serve_app.tokenizer import Tokenizer

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
SAID = "Hello, wörld! How are you?"


class Service:
    """An API whose answers depend on the seed and on `mood`; stands in for `Endpoint`."""

    def __init__(self, api: Any, small: Tokenizer, settings: ApiSettings) -> None:
        self._api, self._small, self._settings = api, small, settings
        self.mood, self.fingerprint = "", "fp_one"

    def __call__(self, url: str, key: str, model: str | None) -> Service:
        return self

    def post(self, path: str, body: dict[str, Any]) -> Reply:
        def script(request: Any) -> Any:
            seed = "" if request.sampling.greedy else request.sampling.seed
            ids = self._small.encode_text(f"{SAID}{self.mood} {seed}")
            return self._api.deltas_of(request, [*ids, self._small.eos_id], range(0, 99, 3))

        engine = self._api.ScriptedEngine(script)
        engine.fingerprint = self.fingerprint

        async def ask() -> Reply:
            app = self._api.build_app(self._settings, self._small, engine)
            async with self._api.client_of(app) as client:
                reply = await client.post(path, json={"model": "deepseek-v3", **body})
                return Reply(reply.status_code, {}, reply.content)

        return asyncio.run(ask())


@pytest.fixture
def service(
    api: Any, small: Tokenizer, settings: ApiSettings, monkeypatch: pytest.MonkeyPatch
) -> Service:
    made = Service(api, small, settings)
    monkeypatch.setattr(module, "Endpoint", made)
    return made


def kept(folder: Path, service: Service, path: str, body: dict[str, Any]) -> tuple[Path, Path]:
    request, response = folder / "request.json", folder / "response"
    request.write_text(json.dumps(body))
    response.write_bytes(service.post(path, body).body)
    return request, response


FORMS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {**CHAT, "seed": 1}),
    ("/v1/chat/completions", {**CHAT, "seed": 1, "n": 3, "logprobs": True, "stream": True}),
    ("/v1/chat/completions", {**CHAT, "temperature": 0, "stream": True,
                              "stream_options": {"include_usage": True}}),
    ("/v1/completions", {"prompt": "Hi", "seed": 5, "logprobs": 1}),
    ("/v1/completions", {"prompt": ["a", "b"], "seed": 5, "stream": True, "echo": True}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body"), FORMS)
def test_the_same_answer_is_the_same_in_every_form(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str], path: str,
    body: dict[str, Any],
) -> None:  # fmt: skip
    files = kept(tmp_path, service, path, body)
    assert replay(*files, "http://x", "k")
    assert capsys.readouterr().out.startswith("The same answer again")


@pytest.mark.parametrize(("path", "body"), FORMS)
def test_the_first_difference_is_told_and_another_fingerprint_too(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str], path: str,
    body: dict[str, Any],
) -> None:  # fmt: skip
    files = kept(tmp_path, service, path, body)
    service.mood, service.fingerprint = "!", "fp_two"
    assert not replay(*files, "http://x", "k")
    told = capsys.readouterr().out
    assert "fp_one then, fp_two now" in told
    index = len(SAID.encode()) if body.get("logprobs") else len(SAID) + 2 * bool(body.get("echo"))
    index -= bool(body.get("echo"))  # one character of prompt
    assert f"{'token' if body.get('logprobs') else 'character'} {index}:" in told


def test_calls_ends_and_counts_are_compared() -> None:
    def answer(**changes: Any) -> str:
        function = {"name": "f", "arguments": changes.get("arguments", "{}")}
        message = {"content": None, "tool_calls": [{"id": "random", "function": function}]}
        choice = {"index": 0, "message": message, "finish_reason": changes.get("end", "stop")}
        usage = {"prompt_tokens": 3, "completion_tokens": changes.get("tokens", 9)}
        choices = [choice] * changes.get("choices", 1)
        return json.dumps({"object": "chat.completion", "choices": choices, "usage": usage})

    base = read_answer(answer())
    assert not list(differences(base, read_answer(answer())))
    for changes, told in [
        ({"arguments": '{"a": 1}'}, "arguments of call 0, character 1"),
        ({"end": "length"}, "ended with 'stop' then, 'length' now"),
        ({"tokens": 10}, "completion_tokens: 9 then, 10 now"),
        ({"choices": 0}, "choice 0 is only in the kept answer"),
    ]:
        (difference,) = differences(base, read_answer(answer(**changes)))
        assert told in difference


def test_what_cannot_be_replayed_is_said(service: Service, tmp_path: Path) -> None:
    files = kept(tmp_path, service, "/v1/chat/completions", CHAT)
    with pytest.raises(ValueError, match="no seed"):
        replay(*files, "http://x", "k")
    files = kept(tmp_path, service, "/v1/chat/completions", {**CHAT, "seed": 1})
    for text in ("", "{}", "data: 3\n", "[1]"):
        files[1].write_text(text)
        with pytest.raises(ValueError, match="not a response"):
            replay(*files, "http://x", "k")


def test_a_server_that_is_not_there_is_said(tmp_path: Path, capsys: Any) -> None:
    request, response = tmp_path / "request", tmp_path / "response"
    request.write_text('{"model": "m", "seed": 1}')
    response.write_text('{"object": "chat.completion", "choices": []}')
    with socket.socket() as silent, pytest.raises(SystemExit):
        silent.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        main(["replay", str(request), str(response), "--url", url])
    assert "gave no answer" in capsys.readouterr().err
