"""Talk, tools and reading: calls fit their functions, copied values stand in the question, nothing
held out is shown on the way, and every conversation renders."""

import json
from collections import Counter
from collections.abc import Iterator
from datetime import date
from random import Random

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayseek.serve_app.prompt import in_call_order, render_chat
from rayseek.serve_app.tasks import chat, decline, facts, tool_specs, tools
from rayseek.serve_app.tasks.asking import some_day
from rayseek.serve_app.tasks.catalogue import CATALOGUE, task
from rayseek.serve_app.tasks.example import Answer, Call, Chat, Language, Task, is_held_out
from rayseek.serve_app.tasks.tool_requests import Request, request
from rayseek.serve_app.tasks.tool_specs import Declared
from rayseek.serve_app.tasks.wording import drawn, filled, plain, spoken
from rayseek.serve_app.tokenizer import Control
from rayseek.serve_app.vendor_prompts import system_prompt

LANGUAGES: tuple[Language, ...] = ("en", "zh")
EACH = [
    pytest.param(entry, language, id=f"{entry.name}-{language}")
    for entry in CATALOGUE
    for language in entry.languages
]
UNABLE = {language: decline.DECLINES[language]["unable"] for language in LANGUAGES}
BY_LANGUAGE = pytest.mark.parametrize("language", LANGUAGES)


def made(name: str, language: Language, count: int = 500, seed: int = 0) -> Iterator[Chat]:
    random = Random(seed)
    for _ in range(count):
        example = task(name).make(random, language)
        assert isinstance(example, Chat)
        yield example


@pytest.mark.parametrize("entry, language", EACH)
def test_every_conversation_renders_and_names_no_control_token(
    entry: Task, language: Language
) -> None:
    random = Random(2)
    for _ in range(60):
        example = entry.make(random, language)
        if not isinstance(example, Chat):
            continue
        messages = [*in_call_order(example.messages), example.answer]
        prompt = render_chat(messages, tools=example.tools, json_mode=example.json_mode)
        texts = [piece for piece in prompt if isinstance(piece, str)]
        assert not any(control.value in text for control in Control for text in texts)
        assert prompt[-2:] == (Control.EOS, Control.ASSISTANT) or prompt[-1] is Control.EOS
        assert example.messages[-1].role in ("user", "tool")


@pytest.mark.parametrize("name", ("tools", "tooltalk"))
@BY_LANGUAGE
def test_calls_name_offered_functions_and_keep_their_schemas(language: Language, name: str) -> None:
    kinds = Counter[str]()
    for example in made(name, language):
        schemas = {tool["name"]: tool["parameters"] for tool in example.tools}
        assert len(schemas) == len(example.tools)
        calls = [call for message in example.messages for call in message.tool_calls]
        calls += example.answer.tool_calls
        for call in calls:
            arguments = json.loads(call.arguments)
            jsonschema.validate(arguments, {**schemas[call.name], "additionalProperties": False})
            assert call.arguments == json.dumps(arguments, ensure_ascii=False)
        kinds["called" if example.answer.tool_calls else "told" if calls else "said"] += 1
        kinds["several"] += len(calls) > 1
    assert kinds["called"] > 150 and kinds["told"] > 60
    assert kinds["said"] > (60 if name == "tools" else 15) and kinds["several"] > 60


@BY_LANGUAGE
def test_arguments_stand_in_the_question(language: Language) -> None:
    """What is copied is copied exactly; only choices and currencies are said in other words."""
    translated = {
        name
        for spec in tool_specs.SPECS.values()
        for parameter in spec.parameters.values()
        for name in parameter.names
        if parameter.kind in ("currency", "choice")
    }
    for example in made("tools", language):
        question = [m.content or "" for m in example.messages if m.role == "user"][-1]
        for call in example.answer.tool_calls:
            for name, value in json.loads(call.arguments).items():
                if name not in translated and not isinstance(value, bool):
                    assert str(value) in question


@BY_LANGUAGE
def test_a_talk_asks_what_fits_and_what_does_not(
    language: Language, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several questions beside the same functions; before the last, nothing that is held out."""
    held_out: set[tuple[str, str]] = set()

    def noted(random: Random, language: Language, tool: Declared, count: int = 1) -> Request:
        found = request(random, language, tool, count)
        for key, values in zip(found.part_keys, found.calls, strict=True):
            if is_held_out("tools", key):
                held_out.add((tool.name, found.arguments(values)))
        return found

    monkeypatch.setattr(tools, "request", noted)
    kinds = Counter[str]()
    for example in made("tooltalk", language, 300):
        earlier = example.messages[:-1]
        answers = [m for m in earlier if m.role == "assistant" and m.content]
        assert 2 <= len(answers) <= 5
        kinds["called"] += sum(bool(m.tool_calls) for m in earlier)
        kinds["declined"] += sum(m.content == UNABLE[language] for m in answers)
        kinds["held out"] += is_held_out("tooltalk", example.key)
        assert held_out.isdisjoint((c.name, c.arguments) for m in earlier for c in m.tool_calls)
        kinds["avoided"] += len(held_out)
        held_out.clear()
    assert kinds["called"] > 300 and kinds["declined"] > 200 and kinds["held out"] > 20
    assert kinds["avoided"] > 100


@BY_LANGUAGE
def test_answers_to_tools_are_judged_by_their_values_and_their_order_is_free(
    language: Language,
) -> None:
    for example in made("tools", language, 400):
        calls = [Call(c.name, json.loads(c.arguments)) for c in example.answer.tool_calls]
        if calls:
            assert example.judge(Answer("", tuple(reversed(calls))))
            assert not example.judge(Answer("", (*calls, calls[0])))
            assert not example.judge(Answer("", (Call("other", calls[0].arguments), *calls[1:])))
        elif example.messages[-1].role == "tool":
            assert example.judge(Answer("So: " + (example.answer.content or "").upper()))


@BY_LANGUAGE
def test_earlier_turns_and_borrowed_questions_are_not_held_out(language: Language) -> None:
    """A dialogue agrees with the task of its last question about what is held out."""
    held = Counter[bool]()
    for example in made("dialogue", language, 1000):
        source, _, key = example.key.partition("|")
        held[is_held_out(source, key)] += 1
        if not key.split("|")[-1].startswith("then "):
            assert is_held_out("dialogue", example.key) == is_held_out(source, key)
    assert held[True] > 8
    for example in made("tools", language, 500):
        if example.key.startswith("no call|"):
            borrowed = example.key.removeprefix("no call|").rpartition("|")[0]
            names = [name for name in ("chat", "facts", "decline") if is_held_out(name, borrowed)]
            assert len(names) < 3


@BY_LANGUAGE
def test_every_topic_is_asked_in_many_wordings_and_answered_in_one(language: Language) -> None:
    wordings: dict[str, set[str]] = {}
    answers: dict[str, set[str | None]] = {}
    for example in made("chat", language, 8000):
        topic, _, wording = example.key.partition("|")
        wordings.setdefault(topic, set()).add(wording)
        answers.setdefault(topic, set()).add(example.answer.content)
    assert set(wordings) == {topic.name for topic in chat.TOPICS[language]}
    assert len(wordings) > 80
    assert min(map(len, wordings.values())) >= 12
    assert all(len(said) == 1 for said in answers.values())


@BY_LANGUAGE
def test_a_topic_s_answer_fits_few_other_topics(language: Language) -> None:
    topics = chat.TOPICS[language]
    taken = [
        (one.name, other.name)
        for one in topics
        for other in topics
        if one is not other and chat.mentions(one.keys)(Answer(other.answer))
    ]
    assert len(taken) < 0.12 * len(topics) ** 2


@BY_LANGUAGE
def test_known_questions_are_not_declined(language: Language) -> None:
    for name in ("chat", "facts", "arithmetic", "units", "memory"):
        said = {example.answer.content for example in made(name, language, 300)}
        assert said.isdisjoint(decline.DECLINES[language].values())


def test_declined_questions_are_in_no_other_task() -> None:
    """Nothing is asked that another task answers: no question has two answers."""
    for language in LANGUAGES:
        declined = {plain(e.messages[-1].content or "") for e in made("decline", language, 3000)}
        for name in ("chat", "facts", "dates", "units", "lists", "code", "story"):
            asked = {plain(e.messages[-1].content or "") for e in made(name, language, 1000)}
            assert declined.isdisjoint(asked)


def test_statements_are_right_by_their_own_table() -> None:
    random = Random(0)
    right = Counter(facts.statement(random, "en")[2] for _ in range(2000))
    assert 800 < right[True] < 1400
    yes = {key for key, _, so in (facts.statement(random, "en") for _ in range(4000)) if so}
    assert "capital|France|Paris" in yes and "colour|snow|white" in yes
    assert not any(key.startswith("capital|France|") for key in yes - {"capital|France|Paris"})


@BY_LANGUAGE
def test_the_dated_prompt_is_read_by_the_calendar(language: Language) -> None:
    days = [some_day(Random(seed)) for seed in range(150)]
    prompts = {system_prompt(day): day for day in days}
    assert min(days) >= date(2024, 1, 1)
    asked = 0
    for example in made("system", language, 1500):
        day = prompts.get(example.messages[0].content or "")
        if day and example.key.startswith("today"):
            weekday = day.strftime("%A") if language == "en" else "一二三四五六日"[day.weekday()]
            assert weekday in (example.answer.content or "")
            asked += 1
    assert asked > 5


@BY_LANGUAGE
def test_what_is_read_or_remembered_was_told(language: Language) -> None:
    for example in (*made("reading", language, 300), *made("search", language, 200)):
        told = example.messages[-1].content or ""
        answer = (example.answer.content or "").split("[citation")[0]
        assert answer.rstrip(".。").split(" ")[-1].split("是")[-1] in told
    for example in made("memory", language, 500):
        value = example.key.split("|")[1]
        told = " ".join(m.content or "" for m in example.messages[:-1] if m.role == "user")
        assert value in told and value in (example.answer.content or "")


@given(st.integers(0, 10**6), st.sampled_from(LANGUAGES), st.sampled_from("?.!"))
def test_noise_leaves_slots_alone(seed: int, language: Language, end: str) -> None:
    random = Random(seed)
    wording = drawn(
        random, "(what is|tell me) the price of {0} in {place_name}( today|) {=fn_name}"
    )
    text = spoken(random, language, wording, end, polite=0.5)
    assert all(slot in text for slot in ("{0}", "{place_name}", "{=fn_name}"))
    assert filled("{0} and {1}", "{1}", 2) == "{1} and 2"


def test_patterns_give_each_alternative_about_equally_often() -> None:
    random = Random(0)
    seen = Counter(drawn(random, "(a|b(1|2|)|)c") for _ in range(3000))
    assert set(seen) == {"ac", "b1c", "b2c", "bc", "c"}
    assert all(abs(seen[text] - 1000) < 120 for text in ("ac", "c"))
    assert all(abs(seen[text] - 333) < 90 for text in ("b1c", "b2c", "bc"))
