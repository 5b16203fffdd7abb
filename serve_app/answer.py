"""One HTTP request's answer, streamed or whole, from the same pieces.

Written for many streams at once: the fixed parts of a chunk are serialised once per answer, and a
token costs one `json.dumps` of its text and one send.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, Iterable, Sequence
from json.encoder import encode_basestring
from typing import Any, Protocol

from rayseek.cluster.request import Token
from rayseek.serve_app.engine_port import Engine
from rayseek.serve_app.generation import Choice, OutToken, Pieces, run, usage
from rayseek.serve_app.tokenizer import Tokenizer
from rayseek.serve_app.tool_calls import CallArguments, CallEvent, CallHeader

LOWEST_LOGPROB = -9999.0
DONE = b"data: [DONE]\n\n"


def on_one_line(written: str) -> str:
    """The same JSON with line breaks that only Unicode knows escaped: some clients split event
    streams at them."""
    if not written.isascii():
        for char in "\x85\u2028\u2029":
            written = written.replace(char, f"\\u{ord(char):04x}")
    return written


def json_string(text: str) -> str:
    """JSON of a string, UTF-8 kept, on one line."""
    return on_one_line(encode_basestring(text))


def dump(value: object) -> str:
    """JSON of a value, UTF-8 kept, on one line."""
    return on_one_line(json.dumps(value, ensure_ascii=False, separators=(",", ":")))


class Head:
    """The fields that every chunk and document of one answer carries."""

    def __init__(self, model: str, fingerprint: str) -> None:
        self.id, self.created = str(uuid.uuid4()), int(time.time())
        self._model, self._fingerprint = model, fingerprint

    def fields(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self._model,
            "system_fingerprint": self._fingerprint,
        }


class Dialect(Protocol):
    """How one endpoint writes pieces: chat messages or plain text."""

    object: str  # "chat.completion" or "text_completion"
    chunk_object: str

    field: str  # of a chunk, that carries text: "delta" or "text"

    def delta(self, text: str) -> str:
        """JSON of that field."""

    def opening(self, choice: Choice) -> str | None:
        """The same of a choice's first chunk, if the dialect has one."""

    def call_deltas(self, calls: Iterable[CallEvent]) -> list[str]:
        """The same for tool calls, one chunk each."""

    def result(self, choice: Choice, text: str, calls: Iterable[CallEvent]) -> dict[str, Any]:
        """The part of a whole choice that carries its text and calls."""

    def logprobs(self, tokens: Sequence[OutToken]) -> Any: ...


class Answer:
    def __init__(
        self,
        head: Head,
        dialect: Dialect,
        engine: Engine,
        choices: Sequence[Choice],
        *,
        logprobs: bool,
        include_usage: bool = False,
    ) -> None:
        self._head, self._dialect, self._engine = head, dialect, engine
        self.choices, self._logprobs = choices, logprobs
        self._include_usage = include_usage

    def pieces(self) -> Pieces:
        return run(self._engine, self.choices)

    async def document(self) -> dict[str, Any]:
        """The whole answer. Raises what the engine raises."""
        texts: list[list[str]] = [[] for _ in self.choices]
        tokens: list[list[OutToken]] = [[] for _ in self.choices]
        calls: list[list[CallEvent]] = [[] for _ in self.choices]
        finish: dict[int, str | None] = {}
        pieces = self.pieces()
        try:
            async for choice, piece in pieces:
                texts[choice.index].append(piece.text)
                tokens[choice.index] += piece.tokens
                calls[choice.index] += piece.calls
                finish[choice.index] = piece.finish
        finally:
            await pieces.aclose()
        results = [
            {
                "index": choice.index,
                **self._dialect.result(choice, "".join(texts[choice.index]), calls[choice.index]),
                "logprobs": self._dialect.logprobs(tokens[choice.index])
                if self._logprobs
                else None,
                "finish_reason": finish[choice.index],
            }
            for choice in self.choices
        ]
        return {
            **self._head.fields(self._dialect.object),
            "choices": results,
            "usage": usage(self.choices),
        }

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events, at most one `bytes` per delta. Raises what the engine raises."""
        dialect, running = self._dialect, len(self.choices)
        start = dump(self._head.fields(dialect.chunk_object))[:-1]
        tail = b',"usage":null}\n\n' if self._include_usage else b"}\n\n"
        befores = [
            f'data: {start},"choices":[{{"index":{choice.index},"{dialect.field}":'.encode()
            for choice in self.choices
        ]
        after = b',"logprobs":null,"finish_reason":null}]' + tail
        openings = zip(befores, map(dialect.opening, self.choices), strict=True)
        out = b"".join(before + text.encode() + after for before, text in openings if text)
        pieces = self.pieces()
        try:
            async for choice, piece in pieces:
                before = befores[choice.index]
                if piece.tokens and self._logprobs:
                    logprobs = dump(dialect.logprobs(piece.tokens))
                    out += before + dialect.delta(piece.text).encode()
                    out += f',"logprobs":{logprobs},"finish_reason":null}}]'.encode() + tail
                elif piece.text:
                    out += before + dialect.delta(piece.text).encode() + after
                if piece.calls:
                    for delta in dialect.call_deltas(piece.calls):
                        out += before + delta.encode() + after
                if piece.finish:
                    running -= 1
                    out += before + dialect.delta("").encode()
                    out += f',"logprobs":null,"finish_reason":"{piece.finish}"}}]'.encode()
                    out += self._ending(start, tail, last=not running)
                if out:
                    yield out
                    out = b""
        finally:
            await pieces.aclose()

    def _ending(self, start: str, tail: bytes, *, last: bool) -> bytes:
        """The end of a choice's last chunk; of the last choice with usage and [DONE].

        The usage comes once: LangChain adds up what all chunks say.
        """
        if not last:
            return tail
        counts = f'"usage":{dump(usage(self.choices))}}}\n\n'
        if self._include_usage:
            return tail + f'data: {start},"choices":[],{counts}'.encode() + DONE
        return f",{counts}".encode() + DONE


def logprob_of(value: float | None) -> float:
    """A finite number: JSON knows no -Infinity."""
    return LOWEST_LOGPROB if value is None or not value > LOWEST_LOGPROB else value


def _call(header: CallHeader, arguments: str) -> dict[str, Any]:
    return {
        "index": header.index,
        "id": f"call_{header.index}_{uuid.uuid4()}",
        "type": "function",
        "function": {"name": header.name, "arguments": arguments},
    }


class ChatDialect:
    object, chunk_object, field = "chat.completion", "chat.completion.chunk", "delta"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bytes = tokenizer.token_bytes

    def delta(self, text: str) -> str:
        return f'{{"content":{json_string(text)}}}'

    def opening(self, choice: Choice) -> str | None:
        return '{"role":"assistant","content":""}'

    def call_deltas(self, calls: Iterable[CallEvent]) -> list[str]:
        deltas = []
        for event in calls:
            if isinstance(event, CallHeader):
                deltas.append(f'{{"tool_calls":[{dump(_call(event, ""))}]}}')
            elif isinstance(event, CallArguments):
                arguments = json_string(event.text)
                deltas.append(
                    f'{{"tool_calls":[{{"index":{event.index},'
                    f'"function":{{"arguments":{arguments}}}}}]}}'
                )
        return deltas

    def result(self, choice: Choice, text: str, calls: Iterable[CallEvent]) -> dict[str, Any]:
        """Content beside calls is null when there is none, as OpenAI has it."""
        headers: list[CallHeader] = []
        arguments: list[str] = []
        for event in calls:
            if isinstance(event, CallHeader):
                headers.append(event)
                arguments.append("")
            elif isinstance(event, CallArguments):
                arguments[event.index] += event.text
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if headers:
            message["content"] = text or None
            message["tool_calls"] = list(map(_call, headers, arguments))
        return {"message": message}

    def logprobs(self, tokens: Sequence[OutToken]) -> Any:
        entries = []
        for out in tokens:
            top = [self._entry(token_id, value) for token_id, value in out.token.top]
            entry = self._entry(out.token.id, out.token.logprob)
            entries.append({**entry, "top_logprobs": top})
        return {"content": entries}

    def _entry(self, token_id: int, value: float | None) -> dict[str, Any]:
        raw = self._bytes(token_id)
        text = raw.decode("utf-8", "replace")
        return {"token": text, "logprob": logprob_of(value), "bytes": list(raw)}


class TextDialect:
    object, chunk_object, field = "text_completion", "text_completion", "text"

    def __init__(self, tokenizer: Tokenizer, echo: Sequence[str] = ()) -> None:
        """`echo`: the prompts, to be repeated before their answers."""
        self._tokenizer, self._echo = tokenizer, echo

    def _prompt(self, choice: Choice) -> str:
        return self._echo[choice.prompt_index] if self._echo else ""

    def delta(self, text: str) -> str:
        return json_string(text)

    def opening(self, choice: Choice) -> str | None:
        return json_string(self._prompt(choice)) if self._echo else None

    def call_deltas(self, calls: Iterable[CallEvent]) -> list[str]:
        return []  # raw text: calls are not parsed

    def result(self, choice: Choice, text: str, calls: Iterable[CallEvent]) -> dict[str, Any]:
        return {"text": self._prompt(choice) + text}

    def logprobs(self, tokens: Sequence[OutToken]) -> Any:
        def top(token: Token) -> dict[str, float]:
            pairs = (*token.top, (token.id, token.logprob))
            return {self._tokenizer.decode([i]): logprob_of(value) for i, value in pairs}

        return {
            "tokens": [self._tokenizer.decode([out.token.id]) for out in tokens],
            "token_logprobs": [logprob_of(out.token.logprob) for out in tokens],
            "top_logprobs": [top(out.token) for out in tokens],
            "text_offset": [out.offset for out in tokens],
        }
