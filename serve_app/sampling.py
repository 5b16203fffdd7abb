"""The API's sampling fields as the engine's parameters: limits, temperature mapping, seeds."""

from __future__ import annotations

import secrets
from dataclasses import replace

from rayseek.cluster.request import SamplingParams
from rayseek.serve_app.errors import ApiError, bad_request
from rayseek.serve_app.protocol import GenerationFields
from rayseek.serve_app.settings import ApiSettings, TemperatureMapping
from rayseek.serve_app.tokenizer import Tokenizer


def model_temperature(
    api: float | None, mapping: TemperatureMapping, scale: str | None = None
) -> float:
    """DeepSeek's rule of the V3-0324 card: 0..1 -> x 0.3, above 1 -> - 0.7; missing = 1.0.

    With `scale` "model" the caller gave the model's own.
    """
    asked = 1.0 if api is None else float(api)
    if mapping == "none" or (api is not None and scale == "model"):
        return asked
    return asked * 0.3 if asked <= 1 else asked - 0.7


def output_limit(body: GenerationFields, prompt_tokens: int, settings: ApiSettings) -> int:
    """New tokens this request may have. Raises ApiError when they cannot fit.

    An explicit limit that does not fit is refused; the default is cut to what is left.
    """
    most, explicit = settings.max_output_tokens, body.token_limit
    if explicit is not None and not 1 <= explicit <= most:
        name = "max_completion_tokens"
        if getattr(body, name, None) is None:
            name = "max_tokens"
        message = f"Invalid {name} value, the valid range of {name} is [1, {most}]"
        raise bad_request(message, param=name)
    left = settings.context_length - prompt_tokens
    wanted = explicit or max(1, min(settings.default_output_tokens, most, left))
    if wanted > left:
        raise context_exceeded(body, prompt_tokens, wanted, settings)
    return wanted


def context_exceeded(
    body: GenerationFields, prompt_tokens: int | None, wanted: int, settings: ApiSettings
) -> ApiError:
    """DeepSeek's message. prompt_tokens: None if they were not counted to the end."""
    asked = (
        "requested more than that in the messages alone"
        if prompt_tokens is None
        else f"requested {prompt_tokens + wanted} tokens ({prompt_tokens} in the messages, "
        f"{wanted} in the completion)"
    )
    return ApiError(
        400,
        f"This model's maximum context length is {settings.context_length} tokens. However, you "
        f"{asked}. Please reduce the length of the messages or completion.",
        param=body.prompt_field,
        code="context_length_exceeded",
    )


def sampling_params(
    body: GenerationFields,
    *,
    max_tokens: int,
    logprobs: int | None,
    settings: ApiSettings,
    tokenizer: Tokenizer,
    banned: frozenset[int] = frozenset(),
) -> SamplingParams:
    """The engine's parameters of the first choice. Raises ApiError for ids that do not exist.

    `banned` ids are not sampled, except those at which the caller wants to stop.
    """
    stop_ids = tuple(body.stop_token_ids or ())
    for token_id in stop_ids:
        if not tokenizer.is_defined(token_id):
            raise bad_request(f"stop_token_ids: no token {token_id}", param="stop_token_ids")
    if (body.min_tokens or 0) > max_tokens:
        raise bad_request(
            f"min_tokens is {body.min_tokens}, above the limit of {max_tokens} new tokens",
            param="min_tokens",
        )
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=model_temperature(
            body.temperature, settings.temperature_mapping, body.temperature_scale
        ),
        top_k=min(max(0, body.top_k or 0), tokenizer.num_ids),  # more would keep all the same
        top_p=_or(body.top_p, 1.0),
        min_p=_or(body.min_p, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        logit_bias=_logit_bias(body.logit_bias or {}, tokenizer),
        banned_ids=tuple(sorted(banned.difference(stop_ids))),
        seed=secrets.randbits(64) if body.seed is None else body.seed % 2**64,
        stop_token_ids=stop_ids if body.ignore_eos else (tokenizer.eos_id, *stop_ids),
        min_tokens=body.min_tokens or 0,
        logprobs=logprobs,
    )


def for_choice(params: SamplingParams, index: int) -> SamplingParams:
    """Choice `index` of one HTTP request draws with a seed of its own."""
    return params if index == 0 else replace(params, seed=(params.seed + index) % 2**64)


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)


def _logit_bias(bias: dict[str, float], tokenizer: Tokenizer) -> tuple[tuple[int, float], ...]:
    pairs: dict[int, float] = {}
    for key, value in bias.items():
        token_id = int(key) if key.isascii() and key.isdigit() and len(key) < 10 else -1
        if not tokenizer.is_defined(token_id):
            raise bad_request(f"logit_bias: {key!r} is not a token id", param="logit_bias")
        pairs[token_id] = float(value)
    return tuple(sorted(pairs.items()))
