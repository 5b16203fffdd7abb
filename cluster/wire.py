"""Requests and deltas as the messages of `tokens.proto`, and back. Pure conversions."""

from __future__ import annotations

from collections.abc import Iterable

from rayseek.cluster.request import Delta, FinishReason, Request, RequestRefused, SamplingParams
from rayseek.cluster.request import Token as SampledToken
from rayseek.cluster.tokens_pb2 import (
    CANCELLED,
    ERROR,
    LENGTH,
    REFUSED,
    RUNNING,
    STOP,
    Logprob,
    Sampling,
    Submit,
    Update,
)

SERVICE = "rayseek.TokenChannel"
METHOD = "Open"
FETCH = "Fetch"
COPY = "Copy"
# A host can vanish, or hang with all that runs on it, without closing its sockets, at either end:
# both ask whether the other lives.
KEEPALIVE = [
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 10_000),  # for the kernel to tell: TCP_USER_TIMEOUT
    ("grpc.http2.ping_timeout_ms", 10_000),  # for the answer; by default a minute
    # By default two, and gRPC's own of a stream's bandwidth are among them: who only reads had
    # none left, and never heard of a host that hung.
    ("grpc.http2.max_pings_without_data", 0),
]
CHANNEL_OPTIONS = [("grpc.max_receive_message_length", -1), *KEEPALIVE]
# By default, a server hangs up on who asks so on a stream on which nothing is said: an idle one
# after 220 s, with whatever waits on it.
SERVER_OPTIONS = [("grpc.http2.max_ping_strikes", 0), *KEEPALIVE]

_TO_WIRE = {
    None: RUNNING,
    FinishReason.STOP: STOP,
    FinishReason.LENGTH: LENGTH,
    FinishReason.CANCELLED: CANCELLED,
    FinishReason.ERROR: ERROR,
}
_FROM_WIRE = {value: key for key, value in _TO_WIRE.items()}


def submit_message(handle: int, request: Request, source: str = "") -> Submit:
    """The request as it travels; its id stays with the ingress, the handle stands for it.

    source: where the rank may fetch the prompt's pages.
    """
    p = request.sampling
    return Submit(
        handle=handle,
        prompt_ids=request.prompt_ids,
        emitted_ids=request.emitted_ids,
        cache_salt=request.cache_salt,
        priority=request.priority,
        grammar=request.grammar,
        trace=request.trace,
        source=source,
        sampling=Sampling(
            max_tokens=p.max_tokens,
            temperature=p.temperature,
            top_k=p.top_k,
            top_p=p.top_p,
            min_p=p.min_p,
            frequency_penalty=p.frequency_penalty,
            presence_penalty=p.presence_penalty,
            repetition_penalty=p.repetition_penalty,
            bias_ids=[i for i, _ in p.logit_bias],
            biases=[bias for _, bias in p.logit_bias],
            banned_ids=p.banned_ids,
            seed=p.seed,
            stop_token_ids=p.stop_token_ids,
            min_tokens=p.min_tokens,
            logprobs=p.logprobs,
        ),
    )


def request_of(message: Submit, request_id: str) -> Request:
    """The request of a Submit under the receiver's own id."""
    s = message.sampling
    return Request(
        id=request_id,
        prompt_ids=tuple(message.prompt_ids),
        emitted_ids=tuple(message.emitted_ids),
        cache_salt=message.cache_salt,
        priority=message.priority,
        grammar=message.grammar,
        trace=message.trace,
        sampling=SamplingParams(
            max_tokens=s.max_tokens,
            temperature=s.temperature,
            top_k=s.top_k,
            top_p=s.top_p,
            min_p=s.min_p,
            frequency_penalty=s.frequency_penalty,
            presence_penalty=s.presence_penalty,
            repetition_penalty=s.repetition_penalty,
            logit_bias=tuple(zip(s.bias_ids, s.biases, strict=True)),
            banned_ids=tuple(s.banned_ids),
            seed=s.seed,
            stop_token_ids=tuple(s.stop_token_ids),
            min_tokens=s.min_tokens,
            logprobs=s.logprobs if s.HasField("logprobs") else None,
        ),
    )


def update_message(handle: int, delta: Delta) -> Update:
    return Update(
        handle=handle,
        ids=[token.id for token in delta.tokens],
        logprobs=[
            Logprob(
                logprob=token.logprob,
                top_ids=[i for i, _ in token.top],
                top_logprobs=[value for _, value in token.top],
            )
            for token in delta.tokens
            if token.logprob is not None
        ],
        finish=_TO_WIRE[delta.finish],
        cached_tokens=delta.cached_tokens,
        message=delta.error or "",
        drafts=draft_codes(delta.tokens),
    )


def draft_codes(tokens: Iterable[SampledToken]) -> list[int]:
    """What `tokens.proto` says of drafts; empty where there were none."""
    codes = [1 if t.drafted else t.rejected and 1 + t.rejected for t in tokens]
    return codes if any(codes) else []


def plain_token(token_id: int, draft_code: int = 0) -> SampledToken:
    """A token without log-probabilities from its id and `draft_codes`."""
    if not draft_code:
        return SampledToken(token_id)
    return SampledToken(token_id, drafted=draft_code == 1, rejected=draft_code - 1)


def refusal_message(handle: int, refusal: RequestRefused) -> Update:
    return Update(
        handle=handle, finish=REFUSED, message=refusal.reason, retryable=refusal.retryable
    )


def delta_of(update: Update, request_id: str) -> Delta:
    """The delta of an Update. Raises RequestRefused for a refusal."""
    if update.finish == REFUSED:
        raise RequestRefused(update.message, update.retryable)
    codes = update.drafts or [0] * len(update.ids)
    tokens = tuple(map(plain_token, update.ids, codes))
    if update.logprobs:
        tokens = tuple(
            t._replace(logprob=lp.logprob, top=tuple(zip(lp.top_ids, lp.top_logprobs, strict=True)))
            for t, lp in zip(tokens, update.logprobs, strict=True)
        )
    return Delta(
        request_id,
        tokens,
        _FROM_WIRE[update.finish],
        update.cached_tokens if update.HasField("cached_tokens") else None,
        update.message or None,
    )
