"""Messages to prompts by the rules of V3-0324's chat template (spec sections 5.3 and 5.5).

A prompt is control tokens and text spans, never one string: what a caller wrote can not be taken
for structure. The order rules of messages, with DeepSeek's own error texts, are checked here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal

from rayseek.serve_app.errors import bad_request
from rayseek.serve_app.tokenizer import Control, Prompt
from rayseek.serve_app.vendor_prompts import system_prompt

Role = Literal["system", "user", "assistant", "tool"]
DEFAULT_SYSTEM = "You are a helpful Assistant."
MAX_TOOLS_CHARS = 2**20  # of all of a request's, as the prompt shows them; no context holds more
_INDENTED = json.JSONEncoder(indent=4, ensure_ascii=False)
JSON_MODE = "\n\n## Response Format\n\nReply with JSON object ONLY."

UNANSWERED_CALLS = (
    "An assistant message with 'tool_calls' must be followed by tool messages responding to each "
    "'tool_call_id'. (insufficient tool messages following tool_calls message)"
)
STRAY_RESULT = (
    "Messages with role 'tool' must be a response to a preceding message with 'tool_calls'"
)
EMPTY_ASSISTANT = "Invalid assistant message: content or tool_calls must be set"


@dataclass(frozen=True, slots=True)
class ToolCall:
    id: str
    name: str
    arguments: str  # exactly as the model wrote them: reserialised JSON has other tokens


@dataclass(frozen=True, slots=True)
class Message:
    """`content` is None only beside tool calls; `prefix`: the answer goes on from this text."""

    role: Role
    content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    prefix: bool = False


class _Writer:
    """Collects a prompt; text pieces that meet become one span, as tokenisation needs."""

    def __init__(self) -> None:
        self._pieces: list[Control | str] = []

    def write(self, *pieces: Control | str) -> None:
        for piece in pieces:
            last = self._pieces[-1] if self._pieces else None
            if isinstance(piece, str) and isinstance(last, str):
                self._pieces[-1] = last + piece
            elif piece != "":
                self._pieces.append(piece)

    def prompt(self) -> Prompt:
        return tuple(self._pieces)


def render_chat(
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    json_mode: bool = False,
    generation_prompt: bool = True,
) -> Prompt:
    """A conversation as a prompt. `tools` are function objects (name, description, parameters).

    A last message with `prefix` is left open, without EOS. Message order is not checked here.
    """
    prefix = messages[-1].content if messages and messages[-1].prefix else None
    if prefix is not None:
        messages, generation_prompt = messages[:-1], True
    out = _Writer()
    out.write(Control.BOS, _system_text(messages, tools, json_mode))
    last: Role | None = None
    after_results = False
    for message in messages:
        match message.role:
            case "system":
                continue
            case "user":
                out.write(Control.USER, message.content or "", Control.ASSISTANT)
                after_results = False
            case "assistant":
                if after_results:
                    out.write(Control.OUTPUTS_END)
                out.write(message.content or "")
                _write_calls(out, message.tool_calls)
                out.write(Control.EOS)
                after_results = False
            case "tool":
                out.write("\n" if after_results else Control.OUTPUTS_BEGIN)
                out.write(Control.OUTPUT_BEGIN, message.content or "", Control.OUTPUT_END)
                after_results = True
        last = message.role
    if after_results:
        out.write(Control.OUTPUTS_END)
    if generation_prompt and last not in ("user", "tool"):
        out.write(Control.ASSISTANT)
    if prefix is not None:
        out.write(prefix)
    return out.prompt()


def default_system_prompt(choice: str, today: date) -> str | None:
    """What the operator chose (spec 6.2): `none`, `deepseek`, or a text of their own."""
    if choice == "deepseek":
        return system_prompt(today)
    return None if choice == "none" else choice


def render_fim(prefix: str, suffix: str) -> Prompt:
    """Fill in the middle: the model writes what stands between the two (spec 5.5)."""
    out = _Writer()
    out.write(Control.BOS, Control.FIM_BEGIN, prefix, Control.FIM_HOLE, suffix, Control.FIM_END)
    return out.prompt()


def render_text(text: str) -> Prompt:
    """A raw completion: BOS and the text."""
    return (Control.BOS, text) if text else (Control.BOS,)


def as_text(prompt: Prompt) -> str:
    """The prompt with control tokens by name: for people and logs, not for tokenising."""
    return "".join(p.value if isinstance(p, Control) else p for p in prompt)


def _system_text(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], json_mode: bool
) -> str:
    text = "\n\n".join(m.content or "" for m in messages if m.role == "system")
    if tools or json_mode:
        text = text or DEFAULT_SYSTEM
    if tools:
        text += "\n\n## Tools\n\n### Function\n\nYou have the following functions available:\n\n"
        text += "\n".join(_tool_blocks(tools))
    return text + JSON_MODE if json_mode else text


def _tool_blocks(tools: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Each tool as the model sees it. Raises ApiError (400) before they are far too long: indented,
    a deep schema has hundreds of times the characters that were sent."""
    room = MAX_TOOLS_CHARS
    for tool in tools:
        pieces: list[str] = []
        for piece in _INDENTED.iterencode(tool):
            pieces.append(piece)
            room -= len(piece)
            if room < 0:
                raise bad_request(
                    f"tools: in the prompt they have more than {MAX_TOOLS_CHARS:,} characters",
                    param="tools",
                )
        yield f"- `{tool['name']}`:\n```json\n{''.join(pieces)}\n```"


def _write_calls(out: _Writer, calls: Sequence[ToolCall]) -> None:
    for index, call in enumerate(calls):
        out.write("\n" if index else Control.CALLS_BEGIN)
        out.write(Control.CALL_BEGIN, "function", Control.TOOL_SEP)
        out.write(f"{call.name}\n```json\n{call.arguments}\n```", Control.CALL_END)
    if calls:
        out.write(Control.CALLS_END)


def in_call_order(messages: Sequence[Message]) -> list[Message]:
    """Check the order of messages and sort tool results into the order of their calls.

    System messages are hoisted by the template, so they do not count here. Raises ApiError (400)
    with DeepSeek's texts (spec section 6.5).
    """
    ordered: list[Message] = []
    places: dict[str | None, list[int]] = {}  # of the results that must come now, by their call
    missing = 0  # of these results
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if message.role == "system":
            ordered.append(message)
        elif message.role == "tool":
            if not places.get(message.tool_call_id):
                raise bad_request(STRAY_RESULT, param=f"{where}.tool_call_id")
            ordered[places[message.tool_call_id].pop()] = message
            missing -= 1
        else:
            if missing:
                raise bad_request(UNANSWERED_CALLS, param=where)
            _check_assistant(message, where, last=index == len(messages) - 1)
            ordered.append(message)
            places, missing = {}, len(message.tool_calls)
            for place, call in reversed([*enumerate(message.tool_calls, len(ordered))]):
                places.setdefault(call.id, []).append(place)
            ordered += [message] * missing  # until their results come
    if missing:
        raise bad_request(UNANSWERED_CALLS, param=f"messages[{len(messages) - 1}]")
    return ordered


def _check_assistant(message: Message, where: str, *, last: bool) -> None:
    """Raises ApiError for an assistant message that says nothing or is a prefix out of place."""
    if message.role == "assistant" and message.content is None and not message.tool_calls:
        raise bad_request(EMPTY_ASSISTANT, param=where)
    if not message.prefix:
        return
    if message.role != "assistant":
        problem = "prefix needs a message of role assistant"
    elif not last:
        problem = "prefix must be on the last message"
    elif message.tool_calls or message.content is None:
        problem = "a prefix is text, without tool_calls"
    else:
        return
    raise bad_request(problem, param=f"{where}.prefix")
