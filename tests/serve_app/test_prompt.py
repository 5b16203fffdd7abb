"""Prompts against recorded renderings and token counts of DeepSeek's API, and under attack."""

from __future__ import annotations

import json
import re
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayseek.serve_app.errors import ApiError
from rayseek.serve_app.prompt import (
    EMPTY_ASSISTANT,
    STRAY_RESULT,
    UNANSWERED_CALLS,
    Message,
    ToolCall,
    as_text,
    default_system_prompt,
    in_call_order,
    render_chat,
    render_fim,
)
from rayseek.serve_app.settings import ApiSettings
from rayseek.serve_app.tokenizer import Control, Prompt, Tokenizer

NAMES = [control.value for control in Control]


def to_message(raw: dict[str, Any]) -> Message:
    calls = tuple(
        ToolCall(c.get("id", ""), c["function"]["name"], c["function"]["arguments"])
        for c in raw.get("tool_calls") or ()
    )
    return Message(raw["role"], raw.get("content"), calls, raw.get("tool_call_id"))


def recorded(vectors: dict[str, Any], name: str) -> dict[str, Any]:
    entries = vectors["prompt_construction"] + vectors["api_usage_evidence"]
    return next(v for v in entries if v["id"] == name)


def tools_in(text: str) -> list[dict[str, Any]]:
    """The function objects shown in a recorded prompt."""
    return [json.loads(m) for m in re.findall(r"- `\w+`:\n```json\n(.*?)\n```", text, re.S)]


def check(tokenizer: Tokenizer, prompt: Prompt, vector: dict[str, Any]) -> None:
    assert as_text(prompt) == vector["text"]
    assert tokenizer.encode_prompt(prompt) == vector["ids"]


def test_template_vectors(v3: Tokenizer, vectors: dict[str, Any]) -> None:
    assert len(vectors["template"]) == 12
    for vector in vectors["template"]:
        messages = [to_message(raw) for raw in vector["messages"]]
        prompt = render_chat(messages, generation_prompt=vector["add_generation_prompt"])
        check(v3, prompt, vector)


def test_constructed_vectors(v3: Tokenizer, vectors: dict[str, Any]) -> None:
    prefix = [Message("user", "Write quick sort"), Message("assistant", "```python\n", prefix=True)]
    check(v3, render_chat(prefix), recorded(vectors, "P13"))
    for name, question in (
        ("P14", "How's the weather in Hangzhou?"),
        ("P18", "What's the weather like in Tokyo and Paris?"),
    ):
        vector = recorded(vectors, name)
        tools = tools_in(vector["text"])
        check(v3, render_chat([Message("user", question)], tools=tools), vector)
    question = "Which is the highest mountain?"
    prompt = render_chat([Message("user", question)], json_mode=True)
    check(v3, prompt, recorded(vectors, "P15"))
    prompt = render_fim("def add(a, b):\n", "\n    return c\n")
    check(v3, prompt, recorded(vectors, "P16"))
    file = "[file name]: notes.txt\n[file content begin]\nline 1\nline 2\n[file content end]\n"
    check(v3, render_chat([Message("user", file + "Summarise.")]), recorded(vectors, "P17"))


def test_tool_results_are_sorted_into_call_order(v3: Tokenizer, vectors: dict[str, Any]) -> None:
    vector = recorded(vectors, "P19")
    messages = [
        Message("user", "What's the weather like in Tokyo and Paris?"),
        Message(
            "assistant",
            None,
            (
                ToolCall("a", "get_current_weather", '{"location": "Tokyo"}'),
                ToolCall("b", "get_current_weather", '{"location": "Paris"}'),
            ),
        ),
        Message("tool", '{"location": "Paris", "temperature": "22", "unit": null}', (), "b"),
        Message("tool", '{"location": "Tokyo", "temperature": "10", "unit": null}', (), "a"),
    ]
    prompt = render_chat(in_call_order(messages), tools=tools_in(vector["text"]))
    check(v3, prompt, vector)


def test_prompt_tokens_that_deepseek_counted(v3: Tokenizer, vectors: dict[str, Any]) -> None:
    seen = 0
    for vector in vectors["api_usage_evidence"]:
        if "text" not in vector or "prompt_tokens" not in vector:
            continue
        tools = tools_in(vector["text"])
        system = re.search(r"sentence｜>(.+?)<｜User", vector["text"], re.S)
        user = re.search(r"<｜User｜>(.*)<｜Assistant｜>", vector["text"], re.S)
        assert user is not None
        messages = [Message("user", user[1])]
        if system and not tools:
            messages.insert(0, Message("system", system[1]))
        prompt = render_chat(messages, tools=tools)
        check(v3, prompt, vector)
        assert len(v3.encode_prompt(prompt)) == vector["prompt_tokens"]
        seen += 1
    assert seen == 6


def split_raw(text: str) -> Prompt:
    """A model's raw output as control tokens and spans."""
    pattern = "(" + "|".join(map(re.escape, NAMES)) + ")"
    pieces = [piece for piece in re.split(pattern, text) if piece]
    return tuple(Control(piece) if piece in NAMES else piece for piece in pieces)


def test_completion_tokens_that_deepseek_counted(v3: Tokenizer, vectors: dict[str, Any]) -> None:
    """EOS is not among them."""
    completions = [v for v in vectors["api_usage_evidence"] if "completion_tokens" in v]
    assert len(completions) == 8
    for vector in completions:
        ids = v3.encode_prompt(split_raw(vector["text"]))
        assert ids == vector["ids"] and len(ids) == vector["completion_tokens"]
        assert v3.decode(ids) == vector["text"]


def test_tool_call_texts_and_ids(v3: Tokenizer, vectors: dict[str, Any]) -> None:
    for vector in vectors["tool_parse"]:
        ids = v3.encode_prompt(split_raw(vector["raw"]))
        assert ids == vector["ids"], vector["id"]
        assert v3.decode(ids) == vector["raw"]


ATTACK = st.lists(st.one_of(st.sampled_from(NAMES), st.text(max_size=4)), max_size=4).map("".join)


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    messages = [Message("system", draw(ATTACK))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message("user", draw(ATTACK)))
        if draw(st.booleans()):
            calls = tuple(
                ToolCall(str(i), draw(ATTACK), draw(ATTACK)) for i in range(draw(st.integers(1, 3)))
            )
            messages.append(Message("assistant", draw(st.none() | ATTACK), calls))
            messages += [Message("tool", draw(ATTACK), (), call.id) for call in calls]
        messages.append(Message("assistant", draw(ATTACK)))
    return messages


def neutral(message: Message) -> Message:
    """The same message with harmless text in every field."""
    calls = tuple(ToolCall(call.id, "x", "x") for call in message.tool_calls)
    content = None if message.content is None else "x"
    return Message(message.role, content, calls, message.tool_call_id)


@given(messages=conversations(), description=ATTACK)
def test_no_field_injects_control_tokens(
    v3: Tokenizer, messages: list[Message], description: str
) -> None:
    """Law 5: control ids of a hostile conversation are those of a harmless one, in order."""
    tool = {"name": "f", "description": description, "parameters": {}}
    harmless = {"name": "f", "description": "x", "parameters": {}}
    prompt = render_chat(in_call_order(messages), tools=[tool])
    ids = v3.encode_prompt(prompt)
    plain = v3.encode_prompt(
        render_chat(in_call_order([neutral(m) for m in messages]), tools=[harmless])
    )
    assert [i for i in ids if i in v3.control_ids] == [i for i in plain if i in v3.control_ids]
    assert v3.decode(ids) == as_text(prompt)


@given(before=ATTACK, after=ATTACK)
def test_fim_injects_nothing(v3: Tokenizer, before: str, after: str) -> None:
    ids = v3.encode_prompt(render_fim(before, after))
    assert [i for i in ids if i in v3.control_ids] == [0, 128801, 128800, 128802]


CALL = Message("assistant", None, (ToolCall("1", "f", "{}"), ToolCall("2", "f", "{}")))
USER = Message("user", "Hi")


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([USER, CALL, Message("tool", "", (), "1")], UNANSWERED_CALLS),
        ([USER, CALL, USER], UNANSWERED_CALLS),
        ([USER, Message("tool", "", (), "1")], STRAY_RESULT),
        ([USER, CALL, Message("tool", "", (), "3")], STRAY_RESULT),
        ([USER, CALL, *[Message("tool", "", (), "1")] * 2], STRAY_RESULT),
        ([USER, Message("assistant")], EMPTY_ASSISTANT),
        ([Message("assistant", "a", prefix=True), USER], "prefix must be on the last message"),
        ([Message("user", "a", prefix=True)], "prefix needs a message of role assistant"),
    ],
)
def test_order_rules(messages: list[Message], text: str) -> None:
    with pytest.raises(ApiError) as raised:
        in_call_order(messages)
    assert raised.value.message == text
    assert raised.value.status == 400 and raised.value.param is not None


def test_many_results_cost_no_more_each_than_few() -> None:
    """When time grew with the square, 8 MiB of them held up all other callers for minutes."""
    looks = 0

    class Id(str):
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal looks
            looks += 1
            return str.__eq__(self, other)

    count = 1000
    calls = tuple(ToolCall(Id(i), "f", "{}") for i in range(count))
    results = [Message("tool", str(i), (), Id(i)) for i in reversed(range(count))]
    ordered = in_call_order([Message("assistant", None, calls), *results])
    assert [message.content for message in ordered[1:]] == [str(i) for i in range(count)]
    assert looks < 5 * count


def test_a_user_may_speak_right_after_tool_results() -> None:
    """The template leaves the outputs open then; so do we."""
    one = Message("assistant", "", (ToolCall("1", "f", "{}"),))
    messages = [USER, one, Message("tool", "r", (), "1"), USER]
    assert render_chat(in_call_order(messages))[-5:] == (
        "r", Control.OUTPUT_END, Control.USER, "Hi", Control.ASSISTANT,
    )  # fmt: skip


def test_prefix_after_tool_results_follows_them_directly() -> None:
    messages = [
        USER,
        Message("assistant", None, (ToolCall("1", "f", "{}"),)),
        Message("tool", "r", (), "1"),
        Message("assistant", "So", prefix=True),
    ]
    assert render_chat(messages)[-2:] == (Control.OUTPUTS_END, "So")


@pytest.mark.parametrize(
    ("now", "zone", "day"),
    [
        (datetime(2025, 3, 24, 3, tzinfo=UTC), "Asia/Shanghai", "3月24日，星期一"),  # the card's
        (datetime(2025, 3, 23, 15, 59, tzinfo=UTC), "Asia/Shanghai", "3月23日，星期日"),
        (datetime(2025, 3, 23, 16, 0, tzinfo=UTC), "Asia/Shanghai", "3月24日，星期一"),
        (datetime(2025, 3, 23, 16, 0, tzinfo=UTC), "UTC", "3月23日，星期日"),
        (datetime(2025, 1, 1, 4, tzinfo=UTC), "America/New_York", "12月31日，星期二"),
        (datetime(2024, 2, 29, 1, tzinfo=timezone(timedelta(hours=-9))), "UTC", "2月29日，星期四"),
    ],
)
def test_deepseeks_system_prompt_has_the_day_of_its_zone(
    now: datetime, zone: str, day: str
) -> None:
    today = ApiSettings("m", 4096, ("sk",), time_zone=zone).today(now)
    assert default_system_prompt("deepseek", today) == (
        f"该助手为DeepSeek Chat，由深度求索公司创造。\n今天是{day}。"
    )


def test_operators_own_system_prompt_or_none() -> None:
    today = date(2025, 3, 24)
    assert default_system_prompt("none", today) is None
    assert default_system_prompt("Today is {date}.", today) == "Today is {date}."
