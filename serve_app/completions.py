"""`/completions`: raw text or ids to an answer, and fill-in-the-middle when there is a suffix."""

from __future__ import annotations

from rayseek.serve_app.answer import Answer, Head, TextDialect
from rayseek.serve_app.engine_port import Engine
from rayseek.serve_app.errors import bad_request
from rayseek.serve_app.generation import check_count, encode, make_choices
from rayseek.serve_app.prompt import render_fim, render_text
from rayseek.serve_app.protocol import CompletionRequest
from rayseek.serve_app.settings import ApiSettings
from rayseek.serve_app.tokenizer import Tokenizer


async def completion_answer(
    body: CompletionRequest, settings: ApiSettings, tokenizer: Tokenizer, engine: Engine
) -> Answer:
    """Tokenise and set up; nothing runs yet. Raises ApiError (400).

    Text gets BOS before it. Ids are taken as they are: a caller who sends ids means them.
    """
    body.check()
    check_count(body, len(body.prompt), settings)
    texts = [prompt for prompt in body.prompt if isinstance(prompt, str)]
    if texts:
        suffix = body.suffix
        prompts = [render_text(t) if suffix is None else render_fim(t, suffix) for t in texts]
        ids = await encode(body, prompts, tokenizer, settings)
    else:
        ids = [prompt for prompt in body.prompt if isinstance(prompt, list)]
        unknown = next((i for prompt in ids for i in prompt if not tokenizer.is_defined(i)), None)
        if unknown is not None:
            raise bad_request(f"prompt: no token has the id {unknown}", param="prompt")
    head = Head(body.model, engine.fingerprint)
    choices = make_choices(
        body,
        ids,
        request_id=head.id,
        logprobs=body.logprobs,
        settings=settings,
        tokenizer=tokenizer,
    )
    return Answer(
        head,
        TextDialect(tokenizer, echo=texts if body.echo else ()),
        engine,
        choices,
        logprobs=body.logprobs is not None,
        include_usage=body.include_usage,
    )
