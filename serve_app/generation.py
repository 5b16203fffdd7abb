"""From the engine's deltas to the pieces of an answer: the one source of every response.

A streamed and a plain answer are both built from these pieces, in this order, so they cannot
differ. Several choices of one HTTP request run side by side here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rayseek.cluster.request import Delta, FinishReason, Request, Token
from rayseek.serve_app.detokenize import TextStream
from rayseek.serve_app.engine_port import Engine
from rayseek.serve_app.errors import bad_request, server_error
from rayseek.serve_app.protocol import GenerationFields
from rayseek.serve_app.sampling import (
    context_exceeded,
    for_choice,
    output_limit,
    sampling_params,
)
from rayseek.serve_app.settings import ApiSettings
from rayseek.serve_app.tokenizer import Prompt, Tokenizer
from rayseek.serve_app.tool_calls import CallEvent, Event, ToolCallParser, merged

_ENCODERS = ThreadPoolExecutor(2, "encode")


@dataclass(frozen=True, slots=True)
class OutToken:
    """A token to report log-probabilities of; `offset`: characters decoded before it."""

    token: Token
    offset: int


@dataclass(frozen=True, slots=True)
class Piece:
    """What one delta adds to a choice, first the text, then the calls.

    The last piece has `finish`: "stop", "length" or "tool_calls".
    """

    text: str
    tokens: Sequence[OutToken] = ()  # of the content, when log-probabilities were asked for
    finish: str | None = None
    calls: Sequence[CallEvent] = ()


class Choice:
    """One sequence being answered: its request, its text so far, its counts."""

    def __init__(
        self,
        index: int,
        prompt_index: int,
        request: Request,
        text: TextStream,
        silent: frozenset[int],
        parser: ToolCallParser | None = None,
    ) -> None:
        """`silent`: stop tokens that are neither shown nor counted, EOS among them.

        With a `parser`, `text` is the stream of its content.
        """
        self.index, self.prompt_index, self.request = index, prompt_index, request
        self.prompt_tokens = len(request.prompt_ids)
        self.cached_tokens = 0  # of the prompt, as the engine told
        self.completion_tokens = 0  # the markup of calls is counted, the final EOS is not
        self.accepted_drafts = self.rejected_drafts = 0  # of the MTP module, by counted tokens
        self._text, self._silent, self._parser = text, silent, parser
        self._logprobs = request.sampling.logprobs is not None

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return self._text.found

    def feed(self, delta: Delta) -> Piece:
        """Raises ApiError when the engine gave this request up."""
        if delta.cached_tokens is not None:
            self.cached_tokens = delta.cached_tokens
        if delta.finish in (FinishReason.ERROR, FinishReason.CANCELLED):
            raise server_error(delta.error or f"the engine ended this request: {delta.finish}")
        if self._parser:
            return self._parsed(delta, self._parser)
        stream, text = self._text, ""
        shown: list[OutToken] = []
        for token in delta.tokens:
            if token.id in self._silent:
                break  # the engine's stop token, always the last
            self._count(token)
            if self._logprobs:
                shown.append(OutToken(token, stream.decoded))
            text += stream.push(token.id)
            if stream.stopped:
                return Piece(text, shown, "stop")
        if delta.finish is None:
            return Piece(text, shown)
        text += stream.close()
        return Piece(text, shown, "stop" if stream.stopped else delta.finish.value)

    def _count(self, token: Token) -> None:
        self.completion_tokens += 1
        self.accepted_drafts += token.drafted
        self.rejected_drafts += token.rejected

    def _parsed(self, delta: Delta, parser: ToolCallParser) -> Piece:
        """The same where the answer may hold tool calls."""
        events: list[Event] = []
        shown: list[OutToken] = []
        finish = delta.finish.value if delta.finish else None
        for token in delta.tokens:
            if token.id in self._silent:
                break
            self._count(token)
            if self._logprobs and parser.in_content(token.id):
                shown.append(OutToken(token, self._text.decoded))
            events += parser.push(token.id)
            if parser.ended:
                finish = "stop"
                break
        if finish and not parser.ended:
            events += parser.close()
            finish = "stop" if self._text.stopped else finish
        if finish == "stop" and parser.closed:
            finish = "tool_calls"
        text = "".join(event for event in events if isinstance(event, str))
        calls = merged(event for event in events if not isinstance(event, str))
        return Piece(text, shown, finish, calls)


def check_count(body: GenerationFields, prompts: int, settings: ApiSettings) -> None:
    """Raises ApiError (400) for more choices than one request may have."""
    if (count := (body.n or 1) * prompts) > settings.max_choices:
        raise bad_request(
            f"this request asks for {count} choices; at most {settings.max_choices} are allowed",
            param="n",
        )


async def encode(
    body: GenerationFields, prompts: Sequence[Prompt], tokenizer: Tokenizer, settings: ApiSettings
) -> list[list[int]]:
    """Tokenise; long prompts in threads of their own, two at a time, so that other callers' streams
    flow on, and whatever is sent, not much memory is taken. Raises ApiError (400) for what the
    context cannot hold."""

    def encoded() -> list[list[int]]:
        if any(tokenizer.is_longer(prompt, settings.context_length) for prompt in prompts):
            raise context_exceeded(body, None, 0, settings)
        return [tokenizer.encode_prompt(prompt) for prompt in prompts]

    if sum(len(piece) for prompt in prompts for piece in prompt if isinstance(piece, str)) < 8192:
        return encoded()
    return await asyncio.get_running_loop().run_in_executor(_ENCODERS, encoded)


def make_choices(
    body: GenerationFields,
    prompts: Sequence[Sequence[int]],
    *,
    request_id: str,
    logprobs: int | None,
    settings: ApiSettings,
    tokenizer: Tokenizer,
    grammar: str = "",
    banned: frozenset[int] = frozenset(),
    parser_of: Callable[[TextStream], ToolCallParser] | None = None,
) -> list[Choice]:
    """`n` choices of each prompt, numbered through. Raises ApiError (400).

    `banned` ids are not sampled. `parser_of`: how to parse tool calls, if they are to be parsed.
    """
    n = body.n or 1
    hidden = frozenset() if body.skip_special_tokens is False else tokenizer.special_ids
    silent = set() if body.include_stop_str_in_output else set(body.stop_token_ids or ())
    if not body.ignore_eos:
        silent.add(tokenizer.eos_id)
    choices: list[Choice] = []
    for prompt_index, prompt in enumerate(prompts):
        params = sampling_params(
            body,
            max_tokens=output_limit(body, len(prompt), settings),
            logprobs=logprobs,
            settings=settings,
            tokenizer=tokenizer,
            banned=banned,
        )
        for _ in range(n):
            index = len(choices)
            request = Request(
                id=f"{request_id}-{index}" if n * len(prompts) > 1 else request_id,
                prompt_ids=tuple(prompt),
                sampling=for_choice(params, index),
                cache_salt=body.cache_salt or "",
                priority=body.priority or 0,
                grammar=grammar,
            )
            text = TextStream(
                tokenizer.token_bytes,
                stop=body.stop or (),
                include_stop=bool(body.include_stop_str_in_output),
                min_tokens=params.min_tokens,
                hidden=hidden,
            )
            parser = parser_of(text) if parser_of else None
            choices.append(Choice(index, prompt_index, request, text, frozenset(silent), parser))
    return choices


Pieces = AsyncGenerator[tuple[Choice, Piece], None]


async def _run_one(engine: Engine, choice: Choice) -> Pieces:
    deltas = engine.generate(choice.request)
    try:
        async for delta in deltas:
            piece = choice.feed(delta)
            yield choice, piece
            if piece.finish:
                return
        raise server_error("the engine ended this request without a finish reason")
    finally:
        await deltas.aclose()


async def run(engine: Engine, choices: Sequence[Choice]) -> Pieces:
    """Every choice's pieces until all have finished. Closing it cancels what still runs.

    Raises the first error of any choice, after cancelling the others.
    """
    if len(choices) == 1:
        one = _run_one(engine, choices[0])
        try:
            async for item in one:
                yield item
        finally:
            await one.aclose()
        return
    # Bounded, so that a slow reader holds the engine's streams back instead of filling memory.
    queue: asyncio.Queue[tuple[Choice, Piece] | BaseException] = asyncio.Queue(4 * len(choices))

    async def pump(choice: Choice) -> None:
        pieces = _run_one(engine, choice)
        try:
            async for item in pieces:
                await queue.put(item)
        except Exception as error:
            await queue.put(error)
        finally:
            await pieces.aclose()

    tasks = [asyncio.create_task(pump(choice)) for choice in choices]
    try:
        running = len(choices)
        while running:
            got = await queue.get()
            if isinstance(got, BaseException):
                raise got
            running -= got[1].finish is not None
            yield got
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def usage(choices: Sequence[Choice]) -> dict[str, object]:
    """The usage object. Choices of the same prompt count it once (spec section 6.6).

    A prompt's hits are those that every one of its choices had. Predictions are the drafts of the
    server's own MTP module: accepted ones are completion tokens, rejected ones are not counted
    elsewhere (those of OpenAI's Predicted Outputs, which the caller sends, are).
    """
    prompts: dict[int, tuple[int, int]] = {}  # prompt -> (its tokens, hits)
    for choice in choices:
        tokens, hit = prompts.get(choice.prompt_index, (choice.prompt_tokens, choice.prompt_tokens))
        prompts[choice.prompt_index] = tokens, min(hit, choice.cached_tokens)
    prompt_tokens = sum(tokens for tokens, _ in prompts.values())
    hits = sum(hit for _, hit in prompts.values())
    completion = sum(choice.completion_tokens for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": hits},
        "completion_tokens_details": {
            "accepted_prediction_tokens": sum(choice.accepted_drafts for choice in choices),
            "rejected_prediction_tokens": sum(choice.rejected_drafts for choice in choices),
        },
        "prompt_cache_hit_tokens": hits,
        "prompt_cache_miss_tokens": prompt_tokens - hits,
    }
