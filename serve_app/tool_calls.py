"""Token ids of an answer to text and tool calls: the state machine of spec section 5.7.

Calls are recognised by their marker ids, never by their looks, so text can neither open nor close
one. Pure and incremental; the sum of the events does not depend on how the ids were grouped.

What the table of the specification leaves open:
- A marker that opens nothing is dropped from content. Text between and after calls is dropped.
- A marker out of order begins anew what it begins. A call whose name never came whole is
  dropped; arguments that never came are "".
- A complete closing fence at the end of the answer, or before a `calls_end`, closes its call even
  if `call_end` is missing.
- The answer ends with `calls_end`, or with its first call where only one is allowed.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto

from rayseek.serve_app.detokenize import TextStream
from rayseek.serve_app.tokenizer import Control, Tokenizer

CALL_MARKERS = (
    Control.CALLS_BEGIN,
    Control.CALLS_END,
    Control.CALL_BEGIN,
    Control.CALL_END,
    Control.TOOL_SEP,
)
FENCE, FENCE_END = "```", "\n```"

_Utf8 = codecs.getincrementaldecoder("utf-8")


@dataclass(frozen=True, slots=True)
class CallHeader:
    """A call begins. `name` is what the model wrote, declared or not."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    index: int
    text: str  # never empty


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The model closed the call. A call that the token limit cut has no end."""

    index: int


CallEvent = CallHeader | CallArguments | CallEnd
Event = str | CallEvent  # a `str` is content


class _State(Enum):
    TEXT = auto()  # content
    BETWEEN = auto()  # inside the calls, outside of a call
    TYPE = auto()  # "function"
    NAME = auto()
    FENCE = auto()  # the opening fence of the arguments
    ARGS = auto()


class ToolCallParser:
    def __init__(
        self,
        tokenizer: Tokenizer,
        content: TextStream,
        *,
        parallel: bool = True,
    ) -> None:
        """`content` makes the text before the calls; its stop strings apply nowhere else.

        Not `parallel`: one call at most.
        """
        self.ended = False  # nothing more is taken
        self.closed = 0  # calls that the model closed
        self._content, self._parallel = content, parallel
        self._bytes = tokenizer.token_bytes
        self._markers = {tokenizer.id_of(control): control for control in CALL_MARKERS}
        self._state = _State.TEXT
        self._index = -1  # of the call whose header was told last
        self._utf8 = _Utf8("replace")
        self._held = ""  # text that cannot be judged yet

    def in_content(self, token_id: int) -> bool:
        """Whether this id, if it came now, would be a token of the content."""
        return self._state is _State.TEXT and token_id not in self._markers

    def push(self, token_id: int) -> list[Event]:
        """What one more token tells. Not to be called after `ended`."""
        marker, events = self._markers.get(token_id), list[Event]()
        match self._state, marker:
            case _State.TEXT, None:
                events.append(self._content.push(token_id))
                self.ended = self._content.stopped
            case _State.TEXT, Control.CALLS_BEGIN | Control.CALL_BEGIN:
                events.append(self._content.close())
                self.ended = self._content.stopped
                opened = marker is Control.CALLS_BEGIN
                self._state = _State.BETWEEN if opened else _State.TYPE
            case _State.BETWEEN | _State.TYPE | _State.NAME, Control.CALL_BEGIN:
                self._restart(_State.TYPE)
            case _State.BETWEEN | _State.TYPE | _State.NAME, Control.CALLS_END:
                self.ended = True
            case _State.BETWEEN | _State.TYPE | _State.NAME, Control.CALLS_BEGIN:
                self._restart(_State.BETWEEN)
            case _State.TYPE | _State.NAME, Control.TOOL_SEP:
                self._restart(_State.NAME)
            case _State.TYPE, Control.CALL_END:
                self._restart(_State.BETWEEN)
            case _State.NAME | _State.FENCE | _State.ARGS, Control.CALL_END:
                self._end_call(events)
            case _State.ARGS, Control.CALLS_END if self._fenced:
                self._end_call(events)
                self.ended = True
            case (_State.NAME, None) | (_State.FENCE | _State.ARGS, _):
                # Markers are text here: a model may quote them inside a JSON string.
                if token_id not in self._content.hidden:
                    self._feed(self._utf8.decode(self._bytes(token_id)), events)
            case _:
                pass  # dropped
        return [event for event in events if event != ""]

    def close(self) -> list[Event]:
        """The rest, when no token is to come: an unfinished call ends as it is."""
        events: list[Event] = []
        if self._state is _State.TEXT:
            events.append(self._content.close())
        elif self._state in (_State.FENCE, _State.ARGS):
            self._flush(events)
        self.ended = True
        return [event for event in events if event != ""]

    @property
    def _fenced(self) -> bool:
        """Whether the arguments end here with their whole closing fence, and no stray bytes."""
        return self._held == FENCE_END and not self._utf8.getstate()[0]

    def _restart(self, state: _State) -> None:
        self._state, self._held = state, ""
        self._utf8.reset()

    def _feed(self, text: str, events: list[Event]) -> None:
        """More text of a name or of arguments."""
        seen = self._held + text
        if self._state is _State.NAME:
            name, newline, rest = seen.lstrip().partition("\n")
            if not newline:
                self._held = seen
                return
            self._open_call(name, events)
            self._state, seen = _State.FENCE, rest
        if self._state is _State.FENCE:
            begun = _after_fence(seen)
            if begun is None:
                self._held = seen
                return
            self._state, seen = _State.ARGS, begun
        kept = next(n for n in range(len(FENCE_END), -1, -1) if seen.endswith(FENCE_END[:n]))
        cut = len(seen) - kept
        self._held = seen[cut:]
        if cut:
            events.append(CallArguments(self._index, seen[:cut]))

    def _open_call(self, name: str, events: list[Event]) -> None:
        self._index += 1
        events.append(CallHeader(self._index, name.strip()))

    def _flush(self, events: list[Event]) -> bool:
        """Tell the held arguments, unless they are their closing fence: was it complete?"""
        self._feed(self._utf8.decode(b"", final=True), events)
        if self._state is not _State.ARGS:
            return False  # white space, or a piece of the opening fence
        if self._fenced:
            self._close_call(events)
            return True
        if self._held:
            events.append(CallArguments(self._index, self._held))
        return False

    def _end_call(self, events: list[Event]) -> None:
        """At `call_end`, or what stands for it."""
        if self._state is _State.NAME:
            name = self._held + self._utf8.decode(b"", final=True)
            if name.strip():
                self._open_call(name, events)
                self._close_call(events)
        elif not self._flush(events):
            self._close_call(events)
        self._restart(_State.BETWEEN)

    def _close_call(self, events: list[Event]) -> None:
        events.append(CallEnd(self._index))
        self.closed += 1
        self.ended = self.ended or not self._parallel


def _after_fence(text: str) -> str | None:
    """What follows the opening fence: ```` ```json ````, ```` ``` ````, or none before a `{`.

    None while more text is needed to tell.
    """
    text = text.lstrip()
    if FENCE.startswith(text):
        return None
    if not text.startswith(FENCE):
        return text
    head, newline, rest = text.removeprefix(FENCE).partition("\n")
    if newline and head.strip() in ("", "json"):
        return rest
    if not newline and "json".startswith(head.strip()):
        return None
    return text.removeprefix(FENCE).removeprefix("json").lstrip()


def merged(events: Iterable[CallEvent]) -> list[CallEvent]:
    """The same story with argument pieces that meet joined into one."""
    told: list[CallEvent] = []
    for event in events:
        last = told[-1] if told else None
        if isinstance(event, CallArguments) and isinstance(last, CallArguments):
            told[-1] = CallArguments(event.index, last.text + event.text)
        else:
            told.append(event)
    return told


def banned_in_chat(tokenizer: Tokenizer, *, calls: bool) -> frozenset[int]:
    """Ids that a chat answer never holds: control tokens but its end, and the markers of `calls`
    where they are parsed."""
    allowed = {Control.EOS, *(CALL_MARKERS if calls else ())}
    return frozenset(tokenizer.id_of(control) for control in Control if control not in allowed)
