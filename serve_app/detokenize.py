"""Token ids to text, one at a time: UTF-8 across tokens, stop strings across tokens.

Pure, and blind to how tokens were grouped on their way: pushing ids one by one gives, in sum,
exactly the text of all at once, and stops at the same token and character.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection, Sequence

_Utf8 = codecs.getincrementaldecoder("utf-8")


class _Stop:
    """One stop string, matched character by character (Knuth-Morris-Pratt)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0  # characters of `text` that the input now ends with
        self._fallback = [0] * len(text)
        k = 0
        for i in range(1, len(text)):
            while k and text[i] != text[k]:
                k = self._fallback[k - 1]
            k += text[i] == text[k]
            self._fallback[i] = k

    def step(self, char: str) -> bool:
        k = self.matched
        while k and char != self.text[k]:
            k = self._fallback[k - 1]
        k += char == self.text[k]
        self.matched = k
        return k == len(self.text)


class TextStream:
    """The text of one answer.

    The match that ends first wins; of those that end together, the longest. What could still
    become a stop string is held back. Stop strings are not looked for in the text of the first
    `min_tokens` tokens. `hidden` ids have no text.
    """

    def __init__(
        self,
        token_bytes: Callable[[int], bytes],
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        hidden: Collection[int] = frozenset(),
    ) -> None:
        self.stopped = False  # a stop string was found: nothing more is taken
        self.found: str | None = None  # which one
        self.tokens = 0  # tokens taken, the one that completed a stop string included
        self.decoded = 0  # characters decoded, held back and cut ones included
        self._bytes, self.hidden = token_bytes, hidden
        self._stops = [_Stop(text) for text in stop]
        self._firsts = frozenset(text[0] for text in stop)
        self._include_stop, self._min_tokens = include_stop, min_tokens
        self._utf8 = _Utf8("replace")
        self._held = ""

    def push(self, token_id: int) -> str:
        """The text that may be shown now, often one token's, sometimes none."""
        self.tokens += 1
        if token_id in self.hidden:
            return ""
        text = self._utf8.decode(self._bytes(token_id))
        self.decoded += len(text)
        if self.tokens <= self._min_tokens or not self._stops:
            return text
        return self._match(text)

    def close(self) -> str:
        """The rest after the last token: broken UTF-8 as U+FFFD, and what was held back."""
        if self.stopped:
            return ""
        text = self._match(self._utf8.decode(b"", final=True))
        if self.stopped:
            return text
        text, self._held = text + self._held, ""
        return text

    def _match(self, text: str) -> str:
        if not self._held and self._firsts.isdisjoint(text):
            return text  # nothing begun, nothing begins
        seen = self._held + text
        for position in range(len(self._held), len(seen)):
            # Every stop steps on every character, also after one has matched.
            found = [stop for stop in self._stops if stop.step(seen[position])]
            if found:
                self.stopped, self._held = True, ""
                self.found = max((stop.text for stop in found), key=len)
                return seen[: position + 1 - (0 if self._include_stop else len(self.found))]
        keep = max(stop.matched for stop in self._stops)
        cut = len(seen) - keep
        self._held = seen[cut:]
        return seen[:cut]
