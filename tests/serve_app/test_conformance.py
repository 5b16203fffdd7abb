"""The conformance suite passes what is right and finds what is wrong, over real HTTP."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayseek.serve_app import conformance
from rayseek.serve_app.conformance import (
    AREAS,
    Check,
    Endpoint,
    Result,
    Unmet,
    all_checks,
    run_check,
    score_card,
)
from rayseek.serve_app.settings import ApiSettings
from rayseek.serve_app.tokenizer import Control, Prompt, Tokenizer

CHECKS = {made.id: made for made in all_checks()}
# A scripted engine neither knows grammars nor gives three top tokens; the service's tests do.
SCRIPTED = [
    made for made in CHECKS.values()
    if made.area not in ("tools", "json") and made.id != "logprobs.chat"
]  # fmt: skip


class Spoiled:
    """An application whose every response is written anew by `spoil`."""

    def __init__(self, app: ASGIApp, spoil: Callable[[bytes], bytes]) -> None:
        self._app, self._spoil = app, spoil

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def spoiled(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [h for h in message["headers"] if h[0] != b"content-length"]
                message = {**message, "headers": kept}
            elif message.get("body"):
                message = {**message, "body": self._spoil(message["body"])}
            await send(message)

        await self._app(scope, receive, spoiled)


@pytest.fixture(scope="module")
def settings(api: Any) -> ApiSettings:
    return ApiSettings("deepseek-v3", 4096, (api.KEY,), aliases=("deepseek-chat",))


def app_of(api: Any, tokenizer: Tokenizer, settings: ApiSettings) -> Any:
    """Its text depends on the prompt's last id and on the seed."""

    def script(request: Any) -> Any:
        number = request.prompt_ids[-1] + request.sampling.seed % 1000
        ids = [*tokenizer.encode_text(f"Answer {number}, wörld."), tokenizer.eos_id]
        return api.deltas_of(request, ids, range(0, 1000, 3))

    return api.build_app(settings, tokenizer, api.ScriptedEngine(script))


def test_a_right_server_passes(api: Any, small: Tokenizer, settings: ApiSettings) -> None:
    with api.serving(app_of(api, small, settings)) as url:
        at = Endpoint(f"{url}/v1", api.KEY)
        wrong = {r.check.id: r.seen for r in (run_check(m, at) for m in SCRIPTED) if r.seen}
    assert wrong == {}


SPOILS: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("stream.same", lambda b: b.replace(b"data: [DONE]\n\n", b"")),
    ("stream.same", lambda b: b.replace(b'"delta":{"content":"A', b'"delta":{"content":"B')),
    ("stream.same", lambda b: b.replace(b'"stop"', b'"length"') if b"data:" in b else b),
    ("stream.chunks", lambda b: b.replace(b'"created":1', b'"created":2', 1)),
    ("stream.first", lambda b: b.replace(b'"role":"assistant","content":""', b'"role":"bot"')),
    ("stream.content", lambda b: b.replace(b'"content":""}', b'"content":null}')),
    ("stream.last", lambda b: b.replace(b'"usage":{"prompt_tokens"', b'"use":{"prompt_tokens"')),
    ("stream.usage", lambda b: b.replace(b',"usage":null}', b"}")),
    ("chat.answer", lambda b: b.replace(b'"logprobs":null,', b"")),
    ("chat.models", lambda b: b.replace(b'"object":"list"', b'"object":"models"')),
    ("usage.sums", lambda b: b.replace(b'"prompt_cache_hit_tokens":0', b'"prompt_cache_hit_tokens"'
                                       b":1")),
    ("logprobs.count", lambda b: b.replace(b'"completion_tokens":', b'"completion_tokens":1')),
    ("logprobs.text", lambda b: b.replace(b'"text_offset"', b'"offsets"')),
    ("fim.answer", lambda b: b.replace(b'"text_completion"', b'"text.completion"')),
    ("fim.stream", lambda b: b.replace(b'"text":"A', b'"text":" A') if b"data:" in b else b),
    ("errors.values", lambda b: b.replace(b'"param":"temperature"', b'"param":null')),
    ("errors.body", lambda b: b'{"object":"error"}' if b'"error"' in b else b),
    ("errors.context", lambda b: b.replace(b"maximum context", b"largest context")),
]  # fmt: skip


@pytest.mark.parametrize(("id", "spoil"), SPOILS)
def test_a_wrong_server_is_found_out(
    api: Any, small: Tokenizer, settings: ApiSettings, id: str, spoil: Callable[[bytes], bytes]
) -> None:
    with api.serving(Spoiled(app_of(api, small, settings), spoil)) as url:
        result = run_check(CHECKS[id], Endpoint(f"{url}/v1", api.KEY, "deepseek-v3"))
    assert result.seen


@pytest.mark.parametrize("id", [id for id in CHECKS if id.startswith("injection.")])
def test_injection_is_found_out(api: Any, settings: ApiSettings, id: str) -> None:
    class Careless(Tokenizer):
        """Takes names in text for control tokens."""

        def encode_prompt(self, prompt: Prompt) -> list[int]:
            ids: list[int] = []
            for piece in prompt:
                text = piece if isinstance(piece, str) else ""
                found = [c for c in Control if c.value in text]
                ids += [self.id_of(c) for c in found]
                for control in found:
                    text = text.replace(control.value, "")
                ids += super().encode_prompt((text,) if isinstance(piece, str) else (piece,))
            return ids

    careless = Careless(api.byte_tokenizer_file())
    with api.serving(app_of(api, careless, settings)) as url:
        result = run_check(CHECKS[id], Endpoint(f"{url}/v1", api.KEY))
    assert result.seen and "control tokens cost" in result.seen


def test_score_card() -> None:
    def unmet(at: Any) -> None:
        raise Unmet("a cat")

    def odd(at: Any) -> None:
        {}["choices"]

    results = [
        run_check(Check(id, f"{id} holds.", run), Endpoint("http://x", "", "m"))
        for id, run in (("chat.a", unmet), ("chat.b", lambda at: None), ("json.c", odd))
    ]
    assert [result.seen for result in results] == [
        "a cat", None, "an answer of another shape: KeyError('choices')",
    ]  # fmt: skip
    card = score_card(results)
    assert "chat         1 of 2   ✗\n    chat.a: chat.a holds.\n      seen: a cat\n" in card
    assert card.endswith("all          1 of 3   33 %")
    assert score_card([Result(results[0].check, None)]).endswith("1 of 1   100 %")
    assert {made.area for made in CHECKS.values()} == set(AREAS)


def test_nothing_listens_there() -> None:
    with socket.socket() as silent, pytest.raises(ValueError, match="cannot list the models"):
        silent.bind(("127.0.0.1", 0))  # and nobody else gets its port
        conformance.conformance(f"http://127.0.0.1:{silent.getsockname()[1]}", "", None)
