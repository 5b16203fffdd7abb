"""`rayseek replay REQUEST.json RESPONSE.json`: is this what the server says to that, again?

The same request with the same seed gives the same tokens as long as weights and arithmetic are the
same, which `system_fingerprint` names. So a kept answer can be checked: it is asked for again, and
the first difference is told. A response is kept as it came, as one document or as an event stream.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from rayseek.serve_app.conformance import Endpoint, Unmet

CONTEXT = 24  # characters shown before a difference
Json = dict[str, Any]


@dataclass(slots=True)
class Played:
    """What of a choice must come again; the ids of calls are random and are not in it."""

    text: str = ""
    calls: list[list[str]] = field(default_factory=list)  # name, arguments
    finish: str | None = None
    logprobs: list[tuple[str, float]] = field(default_factory=list)

    def add(self, part: Json, logprobs: Json | None, finish: str | None) -> None:
        """One more chunk's delta, or a whole message."""
        self.text += part.get("content") or part.get("text") or ""
        for call in part.get("tool_calls") or ():
            at = call.get("index", len(self.calls))
            self.calls += [["", ""] for _ in range(at + 1 - len(self.calls))]
            function = call.get("function", {})
            self.calls[at][0] += function.get("name") or ""
            self.calls[at][1] += function.get("arguments") or ""
        if logprobs and "content" in logprobs:
            self.logprobs += [(entry["token"], entry["logprob"]) for entry in logprobs["content"]]
        elif logprobs:
            pairs = zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)
            self.logprobs += list(pairs)
        self.finish = finish or self.finish


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer, however it came."""

    kind: str  # "chat.completion" or "text_completion"
    fingerprint: str
    choices: dict[int, Played]
    usage: Json


def read_answer(text: str) -> Answered:
    """A kept response: one JSON document, or `data:` lines. Raises ValueError."""
    documents: list[Json] = []
    try:
        if text.lstrip().startswith("{"):
            documents = [json.loads(text)]
        else:
            lines = [line[6:] for line in text.split("\n") if line.startswith("data: ")]
            documents = [json.loads(line) for line in lines if line != "[DONE]"]
        choices: dict[int, Played] = {}
        for document in documents:
            for choice in document["choices"]:
                part = choice.get("message") or choice.get("delta") or {"text": choice.get("text")}
                played = choices.setdefault(choice["index"], Played())
                played.add(part, choice.get("logprobs"), choice.get("finish_reason"))
        usage: Json = next(filter(None, (d.get("usage") for d in reversed(documents))), {})
        kind = str(documents[0]["object"]).removesuffix(".chunk")
        return Answered(kind, documents[0].get("system_fingerprint") or "", choices, usage)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"not a response of the chat or completions API: {error!r}") from None


def differences(then: Answered, now: Answered) -> Iterator[str]:
    """What differs, the earliest tokens first; nothing where the answers are the same."""
    for index in sorted(then.choices.keys() | now.choices.keys()):
        one, other = then.choices.get(index), now.choices.get(index)
        if one is None or other is None:
            yield f"choice {index} is only in the {'new' if one is None else 'kept'} answer"
            continue
        for number, (old, new) in enumerate(zip(one.logprobs, other.logprobs, strict=False)):
            if old != new:
                told = " now, ".join(f"{token!r} ({logprob})" for token, logprob in (new, old))
                yield f"choice {index}, token {number}: {told} then"
                break
        yield from _text_difference(f"choice {index}", one.text, other.text)
        none = ["", ""]
        for number, calls in enumerate(zip_longest(one.calls, other.calls, fillvalue=none)):
            for what, old_part, new_part in zip(("name", "arguments"), *calls, strict=True):
                where = f"choice {index}, {what} of call {number}"
                yield from _text_difference(where, old_part, new_part)
        if one.finish != other.finish:
            yield f"choice {index} ended with {one.finish!r} then, {other.finish!r} now"
    for count in ("prompt_tokens", "completion_tokens"):
        if then.usage and then.usage.get(count) != now.usage.get(count):
            yield f"{count}: {then.usage.get(count)} then, {now.usage.get(count)} now"


def _text_difference(where: str, then: str, now: str) -> Iterator[str]:
    if then != now:
        at = next(
            (i for i, (a, b) in enumerate(zip(then, now, strict=False)) if a != b),
            min(len(then), len(now)),
        )
        before = then[max(0, at - CONTEXT) : at]
        old, new = (before + text[at : at + CONTEXT] for text in (then, now))
        yield f"{where}, character {at}: {old!r} then, {new!r} now"


def replay(request: Path, response: Path, url: str, key: str) -> bool:
    """Ask again and tell what was found. Raises ValueError, or OSError for files."""
    body = json.loads(request.read_text())
    if not isinstance(body, dict):
        raise ValueError(f"{request} is not a request: it must be a JSON object")
    if body.get("seed") is None and body.get("temperature") != 0:
        raise ValueError(f"{request} has no seed: its answer was drawn with a secret one")
    then = read_answer(response.read_text())
    path = "/v1/completions" if then.kind == "text_completion" else "/v1/chat/completions"
    plain = {k: v for k, v in body.items() if k not in ("stream", "stream_options")}
    try:
        reply = Endpoint(url, key, body.get("model")).post(path, plain).answer()
    except (Unmet, OSError, http.client.HTTPException) as seen:
        raise ValueError(f"{url} gave no answer: {seen}") from None
    now = read_answer(json.dumps(reply))
    if then.fingerprint != now.fingerprint:
        print(
            f"The fingerprints differ: {then.fingerprint or 'none'} then, {now.fingerprint} now. "
            "Other weights or another arithmetic may give other tokens."
        )
    first = next(differences(then, now), None)
    if first is not None:
        print(f"First difference: {first}")
        return False
    tokens = now.usage.get("completion_tokens")
    print(f"The same answer again: {tokens} tokens, {now.fingerprint}")
    return True
