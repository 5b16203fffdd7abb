"""The words that ingress and engine share: a request, its tokens, how it ends.

Plain data without torch, Ray or HTTP. Token ids only: text is the ingress's business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple


class FinishReason(StrEnum):
    """Why a sequence ended. The values are the API's `finish_reason`s."""

    STOP = "stop"  # an end-of-sequence or stop token was sampled
    LENGTH = "length"  # max_tokens reached
    CANCELLED = "cancelled"  # the client went away
    ERROR = "error"  # this request alone failed; see Delta.error


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. `temperature` is the model's, after the API's mapping.

    Order of the steps (spec section 6.1): penalties, logit bias, mask of undefined and banned ids,
    then temperature, top-k, top-p, min-p, and a draw by Gumbel noise from (seed, position, id).
    """

    max_tokens: int
    temperature: float = 1.0  # < 1e-5: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    frequency_penalty: float = 0.0  # on emitted tokens, per occurrence
    presence_penalty: float = 0.0  # on emitted tokens, once
    repetition_penalty: float = 1.0  # on prompt and emitted tokens
    logit_bias: tuple[tuple[int, float], ...] = ()
    banned_ids: tuple[int, ...] = ()  # never sampled, whatever the bias; few different tuples
    seed: int = 0  # uint64; drawn by the ingress when the caller gave none
    stop_token_ids: tuple[int, ...] = ()  # includes EOS unless the caller ignores it
    min_tokens: int = 0  # stop tokens are not sampled before this many
    logprobs: int | None = None  # None: none; n >= 0: the token's and the n most likely

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5

    @property
    def counting(self) -> bool:
        """Whether tokens that are there already change how the next one is drawn."""
        penalised = self.frequency_penalty or self.presence_penalty
        return bool(penalised) or self.repetition_penalty != 1.0


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to continue.

    `emitted_ids` is non-empty when an interrupted request is dispatched again: those tokens were
    delivered already, count against `max_tokens`, and are not sent a second time.
    """

    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    cache_salt: str = ""  # requests share cached pages only under the same salt
    priority: int = 0  # lower runs first
    emitted_ids: tuple[int, ...] = ()
    grammar: str = ""  # what the answer must match (cluster/grammar.py); "": anything
    trace: str = ""  # W3C traceparent of the span that it is part of (traces.py); "": none
    # Does not travel. Told by the dispatcher when the last delta is there: how many are unread.
    on_end: Callable[[int], None] | None = field(default=None, compare=False, repr=False)


class Token(NamedTuple):
    """A sampled token; log-probabilities are of the unmodified logits.

    drafted: it had been proposed by the draft module and came true.
    rejected: drafts that fell because this token was sampled.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    drafted: bool = False
    rejected: int = 0


@dataclass(frozen=True, slots=True)
class Delta:
    """What one engine step brought a request. The last delta carries `finish`."""

    request_id: str
    tokens: tuple[Token, ...] = ()
    finish: FinishReason | None = None
    cached_tokens: int | None = None  # on the first delta: prompt tokens that prefill skipped
    error: str | None = None


@dataclass(slots=True)
class RequestRefused(Exception):
    """The engine cannot take this request: `reason` says why and what to do.

    `retryable`: the queue is full or no rank is up (503, try again after `retry_after_s`).
    Otherwise the request itself can never run here (400).
    """

    reason: str
    retryable: bool = True
    retry_after_s: float = 1.0
    args: tuple[object, ...] = field(default=(), init=False)

    def __str__(self) -> str:
        return self.reason
