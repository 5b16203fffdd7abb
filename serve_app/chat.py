"""`/chat/completions`: a chat request to an answer."""

from __future__ import annotations

from functools import partial

from rayseek.serve_app.answer import Answer, ChatDialect, Head
from rayseek.serve_app.engine_port import Engine
from rayseek.serve_app.generation import check_count, encode, make_choices
from rayseek.serve_app.grammar import grammar_of, wants_json
from rayseek.serve_app.prompt import Message, default_system_prompt, in_call_order, render_chat
from rayseek.serve_app.protocol import ChatRequest
from rayseek.serve_app.settings import ApiSettings
from rayseek.serve_app.tokenizer import Tokenizer
from rayseek.serve_app.tool_calls import ToolCallParser, banned_in_chat


async def chat_answer(
    body: ChatRequest, settings: ApiSettings, tokenizer: Tokenizer, engine: Engine
) -> Answer:
    """Render, tokenise and set up; nothing runs yet. Raises ApiError (400)."""
    body.check()
    check_count(body, 1, settings)
    today = settings.today()
    messages = in_call_order(body.template_messages(today))
    default = default_system_prompt(settings.default_system_prompt, today)
    if default is not None and not any(message.role == "system" for message in messages):
        messages.insert(0, Message("system", default))
    grammar = await grammar_of(body, tokenizer)
    prompt = render_chat(messages, tools=body.template_tools(), json_mode=wants_json(body))
    ids = await encode(body, [prompt], tokenizer, settings)
    head = Head(body.model, engine.fingerprint)
    choices = make_choices(
        body,
        ids,
        request_id=head.id,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        settings=settings,
        tokenizer=tokenizer,
        grammar=grammar,
        banned=banned_in_chat(tokenizer, calls=body.may_call),
        parser_of=partial(ToolCallParser, tokenizer, parallel=body.parallel_tool_calls is not False)
        if body.may_call
        else None,
    )
    return Answer(
        head,
        ChatDialect(tokenizer),
        engine,
        choices,
        logprobs=bool(body.logprobs),
        include_usage=body.include_usage,
    )
