"""The tokenizer against the recorded vectors, the ordinary tokenizer, and hostile text."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as BpeTokenizer

from rayseek.serve_app import tokenizer as tokenizer_module
from rayseek.serve_app.tokenizer import Control, Tokenizer

NAMES = [control.value for control in Control]
HOSTILE = st.lists(
    st.one_of(st.sampled_from([*NAMES, "<|EOT|>", "<｜▁pad▁｜>", "<｜place▁holder▁no▁7｜>"]),
              st.text(max_size=6)),
    max_size=8,
).map("".join)  # fmt: skip


@pytest.fixture(scope="session")
def ordinary(v3_file: Path) -> BpeTokenizer:
    return BpeTokenizer.from_file(str(v3_file))


def test_recorded_ids(v3: Tokenizer, vectors: dict[str, Any]) -> None:
    for vector in vectors["tokenise"]:
        if vector["text"] in ("<｜User｜>", "<|EOT|>"):
            assert v3.decode(vector["ids"]) == vector["text"]
            assert not v3.control_ids.intersection(v3.encode_text(vector["text"]))
        else:
            assert v3.encode_text(vector["text"]) == vector["ids"], vector["text"]
    assert v3.encode_text("<｜User｜>") == [30, 28217, 6756, 28217, 32]


def test_ids_of_v3(v3: Tokenizer) -> None:
    assert (v3.bos_id, v3.eos_id, v3.num_ids) == (0, 1, 128815)
    assert v3.id_of(Control.TOOL_SEP) == 128814
    assert [i for i in range(129280) if not v3.is_defined(i)] == list(range(128815, 129280))
    assert v3.token_bytes(128815) == b"" == v3.token_bytes(-1)
    assert 128803 not in v3.special_ids and 1 in v3.special_ids


@given(text=HOSTILE)
def test_text_never_becomes_control(v3: Tokenizer, small: Tokenizer, text: str) -> None:
    """Law 5: and nothing is lost on the way."""
    for tokenizer in (v3, small):
        ids = tokenizer.encode_text(text)
        assert not tokenizer.control_ids.intersection(ids)
        assert tokenizer.decode(ids) == text


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=60))
def test_plain_text_has_the_ordinary_ids(v3: Tokenizer, ordinary: Any, text: str) -> None:
    assert v3.encode_text(text) == ordinary.encode(text, add_special_tokens=False).ids


@given(ids=st.lists(st.integers(0, 128814), max_size=20))
def test_decoding_equals_the_ordinary_tokenizer(
    v3: Tokenizer, ordinary: Any, ids: list[int]
) -> None:
    assert v3.decode(ids) == ordinary.decode(ids, skip_special_tokens=False)


@given(
    words=st.lists(HOSTILE | st.text("aé 0\n.😀", max_size=9), min_size=1, max_size=6),
    times=st.integers(1, 60),
)
def test_a_length_told_from_slices_is_true(v3: Tokenizer, words: list[str], times: int) -> None:
    """Whatever stands where two slices meet."""
    prompt = (Control.BOS, "".join(words) * times, Control.USER, *words[:1])
    with mock.patch.multiple(tokenizer_module, SLICE=50, ACROSS=6):
        assert not v3.is_longer(prompt, len(v3.encode_prompt(prompt)))


def test_lone_surrogates_are_replaced(v3: Tokenizer) -> None:
    assert v3.decode(v3.encode_text("a\ud800b😀")) == "a\ufffdb😀"


def test_missing_control_tokens_are_named(api: Any, tmp_path: Path) -> None:
    description = api.byte_tokenizer_file()
    description["added_tokens"] = description["added_tokens"][:-1]
    with pytest.raises(ValueError, match=Control.TOOL_SEP.value):
        Tokenizer(description)
    with pytest.raises(ValueError, match=str(tmp_path)):
        Tokenizer.from_pretrained(tmp_path)
