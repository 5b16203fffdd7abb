"""A question of one turn: a wording with its fields, perhaps a system prompt, the answer to learn.

A wording here is a pattern (see `wording`) that ends in its mark, "?" for a question and "." for a
request, with named fields: "(what is|what's) {a} {sign} {b}?".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date as Date
from datetime import timedelta
from random import Random

from rayseek.serve_app.prompt import Message
from rayseek.serve_app.tasks.example import Chat, Judge, Language
from rayseek.serve_app.tasks.wording import drawn, spoken
from rayseek.serve_app.vendor_prompts import system_prompt

SYSTEM_PROMPTS: Mapping[Language, tuple[str, ...]] = {
    "en": (
        "You are a helpful assistant.",
        "You are a helpful assistant.",
        "You are a helpful Assistant.",
        "Answer briefly.",
        "You are a friendly assistant. Keep your answers short.",
        "Be concise.",
        "You are a careful assistant. Answer the question.",
    ),
    "zh": (
        "你是一个有用的助手。",
        "你是一个乐于助人的助手。",
        "请简短地回答。",
        "You are a helpful assistant.",
    ),
}
_MARKS = {"?": "?", "？": "?", ".": ".", "。": "."}
_NO_REQUEST = ("{", "I ", "我")  # begins with what it is about, or is a statement
_REQUESTS: Mapping[Language, tuple[str, ...]] = {
    "en": ("please {}", "please {}", "can you {}", "could you please {}", "{} please"),
    "zh": ("请{}", "请{}", "帮我{}", "请帮我{}"),
}


def phrase(random: Random, language: Language, wordings: Sequence[str], **fields: object) -> str:
    """One of the wordings as somebody types it, with its fields filled in unchanged."""
    text = drawn(random, random.choice(wordings)).replace("  ", " ").replace(" :", ":")
    end = _MARKS.get(text[-1], "")
    if end:
        text = text[:-1]
    polite = 0.15
    if end == ".":
        polite = 0.03
        if text.startswith(_NO_REQUEST):
            polite = 0.0
        elif random.random() < 0.2:
            text = random.choice(_REQUESTS[language]).replace("{}", text)
    return spoken(random, language, text, end, polite).format_map(fields)


def some_day(random: Random) -> Date:
    """A day of this decade."""
    return Date(2024, 1, 1) + timedelta(random.randrange(6 * 365))


def general_system(random: Random, language: Language, *, dated: bool = True) -> str | None:
    """The system prompt of one conversation in five: a general one, or DeepSeek's with its date.

    dated: whether the date may be given away.
    """
    roll = random.random()
    if roll < 0.1:
        return random.choice(SYSTEM_PROMPTS[language])
    return system_prompt(some_day(random)) if dated and roll < 0.2 else None


def chat(
    random: Random,
    language: Language,
    *,
    key: str,
    text: str,
    answer: str,
    judge: Judge,
    system: str | None = None,
    json_mode: bool = False,
    dated: bool = True,
) -> Chat:
    """A question of one turn. Without `system`, one in five has a general system prompt."""
    if system is None:
        system = general_system(random, language, dated=dated)
    question = Message("user", text)
    messages = (question,) if system is None else (Message("system", system), question)
    reply = Message("assistant", answer)
    return Chat(key, messages, reply, judge, json_mode=json_mode, language=language)
