"""A training document is, to the token, what the server would see and what it should answer."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayseek.model.small_tokenizer import learn_tokenizer, small_tokenizer
from rayseek.model.training.corpus import read_shard
from rayseek.serve_app.corpus import (
    GIVEN_WEIGHT,
    TOOLS_WEIGHT,
    encode_documents,
    make_corpus,
    make_tokenizer,
    prompt_of,
)
from rayseek.serve_app.prompt import Message, ToolCall, render_chat
from rayseek.serve_app.protocol import ChatRequest
from rayseek.serve_app.tasks.example import (
    Answer,
    Chat,
    Example,
    Fill,
    Language,
    Split,
    Task,
    is_held_out,
)
from rayseek.serve_app.tokenizer import Control, Tokenizer

TOKENIZER = Tokenizer(json.loads(small_tokenizer(2048)[0]))
EOS = Control.EOS.value
TOOL = {
    "name": "get_weather",
    "description": "Weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}


def accept(answer: Answer) -> bool:
    return True


def add(random: Random, language: Language) -> Example:
    a, b = random.randrange(100), random.randrange(100)
    words = f"What is {a} + {b}?" if language == "en" else f"{a}加{b}等于多少？"
    return Chat(f"{a}+{b}", (Message("user", words),), Message("assistant", f"{a + b}"), accept)


def fill(random: Random, language: Language) -> Example:
    n = random.randrange(10_000)
    return Fill(f"{n}", f"def f(x):\n    return x + {n}", f"\nprint(f({n}))\n", " * 2", accept)


TASKS = (Task("add", add, 3.0), Task("fill", fill, 1.0, ("en",)))

WORDS = st.text(max_size=40)
CALLS = st.lists(st.builds(ToolCall, WORDS, WORDS, WORDS), min_size=1, max_size=3).map(tuple)
EXCHANGES = st.one_of(  # a question with all that follows it up to an assistant's last word
    st.tuples(WORDS, WORDS).map(
        lambda t: (Message("user", t[0]), Message("assistant", t[1]))
    ),
    st.tuples(WORDS, CALLS, WORDS, WORDS).map(
        lambda t: (
            Message("user", t[0]),
            Message("assistant", None, t[1]),
            *(Message("tool", t[2], tool_call_id=call.id) for call in t[1]),
            Message("assistant", t[3]),
        )
    ),
    st.tuples(WORDS, CALLS).map(lambda t: (Message("user", t[0]), Message("assistant", "", t[1]))),
)  # fmt: skip


@st.composite
def chats(draw: st.DrawFn) -> Chat:
    system = [Message("system", text) for text in draw(st.lists(WORDS, max_size=1))]
    turns = draw(st.lists(EXCHANGES, min_size=1, max_size=3))
    messages = (*system, *(message for turn in turns for message in turn))
    return Chat(
        "key",
        messages[:-1],
        messages[-1],
        accept,
        draw(st.sampled_from([(), (TOOL,)])),
        draw(st.booleans()),
    )


FILLS = st.builds(Fill, st.just("key"), WORDS, WORDS, WORDS, st.just(accept))


@given(examples=st.lists(chats() | FILLS, min_size=1, max_size=4))
def test_a_document_is_the_servers_prompt_and_the_answer(examples: list[Example]) -> None:
    for example, (ids, weights) in zip(
        examples, encode_documents(examples, TOKENIZER), strict=True
    ):
        prompt = TOKENIZER.encode_prompt(prompt_of(example))
        assert ids[: len(prompt)] == prompt
        answer = ids[len(prompt) :]
        assert answer[-1] == TOKENIZER.eos_id
        assert set(weights[len(prompt) :]) == {255}
        assert weights[0] == 0 and 0 not in weights[1:]
        if isinstance(example, Fill):
            assert answer == [*TOKENIZER.encode_text(example.middle), TOKENIZER.eos_id]
            assert 255 not in weights[: len(prompt)]
        elif not example.answer.tool_calls:
            text = example.answer.content
            assert answer == [*TOKENIZER.encode_text(text or ""), TOKENIZER.eos_id]


@given(example=chats())
def test_whole_weight_is_on_what_assistants_wrote(example: Chat) -> None:
    """Their messages rendered on their own, with EOS, are the runs of whole weight."""
    ((ids, weights),) = encode_documents([example], TOKENIZER)
    wrote = [m for m in (*example.messages, example.answer) if m.role == "assistant"]
    own = [TOKENIZER.encode_prompt(render_chat([m], generation_prompt=False))[1:] for m in wrote]
    assert [i for i, w in zip(ids, weights, strict=True) if w == 255] == sum(own, [])
    bound = ids.index(TOKENIZER.id_of(Control.USER))
    given = TOOLS_WEIGHT if example.tools else GIVEN_WEIGHT
    assert set(weights[1:bound]) <= {given}
    assert set(weights[bound:]) <= {GIVEN_WEIGHT, 255}


@given(example=chats())
def test_tools_look_the_same_through_the_api(example: Chat) -> None:
    """They go through the request's own types, which might reorder or drop a field."""
    body: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    if example.tools:
        body["tools"] = [{"type": "function", "function": tool} for tool in example.tools]
    tools = ChatRequest.model_validate(body).template_tools()
    shown = render_chat(example.messages, tools=tools, json_mode=example.json_mode)
    assert shown == prompt_of(example)


def test_two_users_in_a_row_are_both_given() -> None:
    asked = (Message("user", "one"), Message("user", "two"))
    ((ids, weights),) = encode_documents(
        [Chat("key", asked, Message("assistant", "x"), accept)], TOKENIZER
    )
    written = [i for i, w in zip(ids, weights, strict=True) if w == 255]
    assert TOKENIZER.decode(written) == f"x{EOS}"


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder, TASKS, 512, each=200)
    return folder


def test_a_tokenizer_learns_the_tasks_words(learnt: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(learnt)
    assert len(tokenizer.encode_text("print")) == 1
    assert len(tokenizer.encode_text("1234")) == 4
    assert sum(not tokenizer.is_defined(i) for i in range(512)) >= 16
    settings = json.loads((learnt / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == EOS
    texts = ["one two", "two three", "three one two"] * 3
    assert learn_tokenizer(texts, 400) == learn_tokenizer(texts[::-1], 400)


def test_a_corpus_can_be_made_again_and_longer(learnt: Path, tmp_path: Path) -> None:
    make_corpus(tmp_path / "one", learnt, TASKS, 3000, 1, seed=5)
    make_corpus(tmp_path / "two", learnt, TASKS, 3000, 2, seed=5)
    make_corpus(tmp_path / "other", learnt, TASKS, 3000, 1, seed=6)
    first = (tmp_path / "one" / "shard-00000.safetensors").read_bytes()
    assert (tmp_path / "two" / "shard-00000.safetensors").read_bytes() == first
    assert (tmp_path / "two" / "shard-00001.safetensors").read_bytes() != first
    assert (tmp_path / "other" / "shard-00000.safetensors").read_bytes() != first

    manifest = json.loads((tmp_path / "two" / "corpus.json").read_text())
    shards = [read_shard(tmp_path / "two" / name) for name in manifest["shards_sha256"]]
    assert [hashlib.sha256(first).hexdigest()] == list(manifest["shards_sha256"].values())[:1]
    tasks = manifest["tasks"]
    assert sum(t["tokens"] for t in tasks.values()) == sum(len(s.ids) for s in shards)
    assert sum(t["documents"] for t in tasks.values()) == sum(map(len, shards))
    assert sum(manifest["documents_up_to"].values()) == sum(map(len, shards))
    answered = sum(int((s.weights == 255).sum()) for s in shards)
    assert sum(t["answer_tokens"] for t in tasks.values()) == answered
    assert all(3000 <= len(s.ids) < 3100 for s in shards)
    assert tasks["add"]["documents"] > 2 * tasks["fill"]["documents"] > 0


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_a_corpus_keeps_to_its_split(learnt: Path, tmp_path: Path, split: Split) -> None:
    make_corpus(tmp_path, learnt, TASKS[:1], 5000, 1, split=split)
    tokenizer = Tokenizer.from_pretrained(learnt)
    shard = read_shard(tmp_path / "shard-00000.safetensors")
    texts = [tokenizer.decode(shard.document(n)[0].tolist()) for n in range(len(shard))]
    asked = set()
    for text in texts:
        question = text.split(Control.USER.value)[1].split(Control.ASSISTANT.value)[0]
        for word in ("What is ", "?", "等于多少？", " "):
            question = question.replace(word, "")
        asked.add(question.replace("加", "+"))
    assert len(asked) > 50
    assert {is_held_out("add", key) for key in asked} == {split == "held-out"}
    assert any("加" in text for text in texts) and any("What" in text for text in texts)


def test_what_is_too_long_stays_out(learnt: Path, tmp_path: Path) -> None:
    make_corpus(tmp_path, learnt, TASKS, 2000, 1, longest=20)
    shard = read_shard(tmp_path / "shard-00000.safetensors")
    assert max(len(shard.document(n)[0]) for n in range(len(shard))) <= 20
    manifest = json.loads((tmp_path / "corpus.json").read_text())
    assert sum(t["too_long"] for t in manifest["tasks"].values()) > 0


def test_no_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokenizer"):
        make_corpus(tmp_path, tmp_path, TASKS, 100, 1)


def test_tokens_hold_whole_characters_and_no_half_sentences() -> None:
    """The first bytes of one character are the only exception."""
    texts = [f"今天天气很好吗？{name}的首都是什么" for name in ("法国", "中国", "德国")] * 50
    tokenizer = Tokenizer(json.loads(learn_tokenizer(texts, 600)[0]))
    assert len(tokenizer.encode_text("法国的首都是什么")) <= 4
    for token in range(tokenizer.num_ids):
        if token not in tokenizer.control_ids:
            word = tokenizer.token_bytes(token)
            text = word.decode("utf-8", "ignore")
            assert len(text) <= 4 or text.isascii()
            assert text.encode() == word or (text == "" and len(word) <= 3)
