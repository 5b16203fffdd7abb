"""Grammars: which tokens may come next in an answer that must keep a form.

A grammar is llguidance's Lark text (`serve_app/grammar.py` writes it). Here it becomes a matcher
for the model's own tokens: compiled in a thread beside the engine's, kept for the next request
with the same text, and asked each step which ids may follow. Compiling and asking are bounded by
fuel that llguidance counts, so that a hostile grammar ends its own request and delays nobody.
Knows no torch: the ingress uses the same limits to refuse what cannot work.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par
from numpy.typing import NDArray

MAX_GRAMMAR_BYTES = 256 * 1024
COMPILE_SECONDS = 10.0  # from submission, queueing for the compiler included
GRAMMARS_KEPT = 64

# Fuel of one mask is about 5 ms and of one compilation a few 100 ms; errors without the grammar.
LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=60_000,
    step_max_items=30_000,
    max_lexer_states=50_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)


class GrammarError(ValueError):
    """A grammar that cannot be used; the message says what is wrong with it."""


def grammar_vocabulary(path: Path, vocab_size: int, eos_id: int) -> LLTokenizer:
    """The tokens of a checkpoint's `tokenizer.json`, for matching. Raises ValueError.

    Every added token counts as control: text never matches one, only `<[id]>` in a grammar does.
    V3's file does not call its tool marks special, and llguidance would guess from their names.
    """
    try:
        description = json.loads((path / "tokenizer.json").read_bytes())
        for token in description["added_tokens"]:
            token["special"] = True
        text = json.dumps(description, ensure_ascii=False)
        return LLTokenizer(text, n_vocab=vocab_size, eos_token=eos_id)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}/tokenizer.json: unusable for grammars ({error!r})") from None


def new_matcher(vocabulary: LLTokenizer, grammar: str) -> LLMatcher:
    """Compile `grammar`. Raises GrammarError."""
    if len(grammar) > MAX_GRAMMAR_BYTES:
        raise GrammarError(f"it has {len(grammar)} bytes; at most {MAX_GRAMMAR_BYTES} are allowed")
    matcher = LLMatcher(vocabulary, grammar, limits=LIMITS, log_level=0)
    if matcher.is_error():
        raise GrammarError(reason(matcher))
    return matcher


def reason(matcher: LLMatcher) -> str:
    """What a matcher in error complains of, in one line, without the grammar's text."""
    text = matcher.get_error().split("\n   1 | ")[0].removesuffix("\n<non-verbose/>")
    return " ".join(text.split("failed to compile JSON schema: ")[-1].split())[:500]


@dataclass(slots=True)
class _Pending:
    future: Future[LLMatcher | str]
    deadline: float


class GrammarCompiler:
    """Matchers for one rank's engine. All methods are called by the engine's thread."""

    def __init__(self, vocabulary: LLTokenizer) -> None:
        self._vocabulary = vocabulary
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()  # the compiler thread's
        self._pending: dict[str, _Pending] = {}
        self._compiler = ThreadPoolExecutor(1, "grammar")
        self._masker = ThreadPoolExecutor(1, "grammar-mask")
        self._executor = LLExecutor(1)
        self.on_ready: Callable[[], None] | None = None  # called in a thread: `finished` has news

    def start(self, key: str, grammar: str, emitted: Sequence[int]) -> None:
        """Begin to make a matcher that stands behind `emitted` tokens."""
        future = self._compiler.submit(self._make, grammar, list(emitted))
        if (tell := self.on_ready) is not None:
            future.add_done_callback(lambda _: tell())
        self._pending[key] = _Pending(future, monotonic() + COMPILE_SECONDS)

    def cancel(self, key: str) -> None:
        pending = self._pending.pop(key, None)
        if pending is not None:
            pending.future.cancel()

    def finished(self, patience_s: float) -> list[tuple[str, LLMatcher | str]]:
        """What `start` has led to: a matcher, or the reason why there is none.

        Waits up to `patience_s` while there is nothing to tell.
        """
        futures = [p.future for p in self._pending.values()]
        wait(futures, timeout=patience_s, return_when=FIRST_COMPLETED)
        now = monotonic()
        outcomes: list[tuple[str, LLMatcher | str]] = []
        for key, pending in list(self._pending.items()):
            if pending.future.done():
                outcomes.append((key, pending.future.result()))
            elif now > pending.deadline:
                late = f"the grammar was not compiled within {COMPILE_SECONDS:.0f} s"
                outcomes.append((key, late))
            else:
                continue
            self.cancel(key)
        return outcomes

    def masks(self, matchers: Sequence[LLMatcher]) -> Future[NDArray[np.uint8]]:
        """Begin to compute uint8 [M, V]: 1 where an id may follow. Changes no matcher's place."""
        return self._masker.submit(self._fill, list(matchers))

    def close(self) -> None:
        self._compiler.shutdown(wait=False, cancel_futures=True)
        self._masker.shutdown(wait=False, cancel_futures=True)

    def _make(self, grammar: str, emitted: list[int]) -> LLMatcher | str:
        """In the compiler's thread. Never raises: the engine's thread must not."""
        try:
            template = self._compiled.get(grammar) or new_matcher(self._vocabulary, grammar)
            self._compiled[grammar] = template
            self._compiled.move_to_end(grammar)
            if len(self._compiled) > GRAMMARS_KEPT:
                self._compiled.popitem(last=False)
            matcher = template.deep_copy()
            if matcher.consume_tokens(emitted):
                return matcher
            return f"the tokens so far do not fit the grammar: {reason(matcher)}"
        except BaseException as error:  # a panic inside llguidance is no Exception
            return f"the grammar cannot be used: {error}"

    def _fill(self, matchers: list[LLMatcher]) -> NDArray[np.uint8]:
        vocab = self._vocabulary.vocab_size
        bits = allocate_token_bitmask(len(matchers), vocab)
        fill_next_token_bitmask_par(
            self._executor, list(zip(matchers, range(len(matchers)), strict=True)), bits
        )
        return np.unpackbits(bits.view(np.uint8), axis=1, count=vocab, bitorder="little")
