"""Grammars in the engine: what they force, how they end, and whom their failures touch."""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayseek.cluster import grammar
from rayseek.cluster.engine import Engine, run_to_end
from rayseek.cluster.grammar import GrammarCompiler, GrammarError, grammar_vocabulary, new_matcher
from rayseek.cluster.request import Delta, FinishReason, Request, RequestRefused, SamplingParams
from rayseek.serve_app.tokenizer import Tokenizer

EngineMaker = Callable[..., Engine]
EOS = 1
JSON = 'start: j\nj: %json {"type": "object", "properties": {"a": {"type": "boolean"}}, ' \
    '"required": ["a"], "additionalProperties": false, ' \
    '"x-guidance": {"whitespace_flexible": false}}'  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tiny_path: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(tiny_path)


def run(engine: Engine) -> dict[str, list[Delta]]:
    deltas: dict[str, list[Delta]] = defaultdict(list)
    run_to_end(engine, lambda d: deltas[d.request_id].append(d))
    engine.pool.check()
    assert engine.pool.available == engine.pool.num_pages
    return deltas


def ids_of(deltas: list[Delta]) -> list[int]:
    return [token.id for delta in deltas for token in delta.tokens]


def request(name: str, text: str, **changes: Any) -> Request:
    changes = {"max_tokens": 60, "temperature": 1.3, "stop_token_ids": (EOS,), **changes}
    return Request(name, (5, 6), SamplingParams(**changes), grammar=text)


@settings(max_examples=15)
@given(
    st.integers(0, 2**32),
    st.sampled_from([0.0, 0.7, 2.0]),
    st.sampled_from([None, 3]),
    st.sampled_from([0, 50]),
    st.booleans(),
)
def test_the_grammar_is_kept_and_its_end_ends_the_answer(
    make_engine: EngineMaker, tokenizer: Tokenizer, seed: int, temperature: float,
    logprobs: int | None, min_tokens: int, ignore_eos: bool,
) -> None:  # fmt: skip
    engine = make_engine()
    stops = () if ignore_eos else (EOS,)
    changes = {"seed": seed, "temperature": temperature, "logprobs": logprobs}
    engine.submit(
        request("r", JSON, min_tokens=min_tokens, stop_token_ids=stops,
                logit_bias=((EOS, 100.0), (0, 100.0)), **changes)
    )  # fmt: skip
    deltas = run(engine)["r"]
    assert deltas[-1].finish is FinishReason.STOP
    assert json.loads(tokenizer.decode(ids_of(deltas))) in ({"a": True}, {"a": False})


def test_eos_comes_only_where_the_grammar_may_end(make_engine: EngineMaker) -> None:
    engine = make_engine()
    bias = ((EOS, 1000.0),)
    for name, text in [("may", "start: /a*/"), ("must not", "start: /a{5}b*/")]:
        engine.submit(request(name, text, logit_bias=bias))
    got = run(engine)
    assert ids_of(got["may"]) == [EOS]
    assert len(ids_of(got["must not"])) > 1
    assert ids_of(got["must not"])[-1] == EOS


def test_text_matches_no_control_token(make_engine: EngineMaker, tokenizer: Tokenizer) -> None:
    """Even V3's tool marks, which its tokenizer.json does not call special."""
    engine = make_engine()
    bias = tuple((i, 1000.0) for i in tokenizer.control_ids if i != EOS)
    engine.submit(request("r", "start: /(.|\\n){30,}/", logit_bias=bias))
    assert not set(ids_of(run(engine)["r"])) & tokenizer.control_ids


def test_length_leaves_a_beginning(make_engine: EngineMaker, tokenizer: Tokenizer) -> None:
    engine = make_engine()
    engine.submit(request("r", 'start: j\nj: %json {"type": "array", "minItems": 9}', max_tokens=3))
    deltas = run(engine)["r"]
    assert deltas[-1].finish is FinishReason.LENGTH
    assert tokenizer.decode(ids_of(deltas)).startswith("[")


BAD = {
    "syntax": ("start: nothing", "unknown name"),
    "schema": ('start: j\nj: %json {"not": {}}', "Unimplemented keys"),
    "too large": ("start: " + '"x" ' * grammar.MAX_GRAMMAR_BYTES, "bytes"),
    "later": (r"start: /(([a-z]{1,100}){1,100}){1,100}/", "cannot be followed"),
    "nowhere": ('start: j\nj: %json {"$ref": "#"}', "cannot be followed"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_grammar_ends_its_own_request(make_engine: EngineMaker, kind: str) -> None:
    """Law 6."""
    text, complaint = BAD[kind]
    good = [request(name, g) for name, g in [("free", ""), ("bound", JSON)]]
    alone: dict[str, list[int]] = {}
    for r in good:
        engine = make_engine()
        engine.submit(r)
        alone[r.id] = ids_of(run(engine)[r.id])
    engine = make_engine()
    for r in [good[0], request("bad", text), good[1]]:
        engine.submit(r)
    got = run(engine)
    assert got["bad"][-1].finish is FinishReason.ERROR
    assert complaint in (got["bad"][-1].error or "")
    assert {name: ids_of(got[name]) for name in alone} == alone


def test_ids_that_the_caller_bans_and_the_grammar_needs_end_the_request(
    make_engine: EngineMaker, tokenizer: Tokenizer
) -> None:
    engine = make_engine()
    a = next(i for i in range(300) if tokenizer.token_bytes(i) == b"a")
    engine.submit(request("r", 'start: "a"', banned_ids=(a,)))
    (delta,) = run(engine)["r"]
    assert delta.finish is FinishReason.ERROR
    assert "exclude each other" in (delta.error or "")


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Compilation waits for this event."""
    gate = threading.Event()

    def slow(vocabulary: Any, text: str) -> Any:
        gate.wait(30)
        return new_matcher(vocabulary, text)

    monkeypatch.setattr(grammar, "new_matcher", slow)
    return gate


def test_compiling_holds_nobody_up(make_engine: EngineMaker, held: threading.Event) -> None:
    engine = make_engine(max_queue=2)
    engine.submit(request("bound", JSON))
    engine.submit(request("free", "", max_tokens=5))
    assert engine.load.waiting == 2
    with pytest.raises(RequestRefused, match="max_queue"):
        engine.submit(request("third", ""))
    finished: list[str] = []
    while "free" not in finished:
        finished += [d.request_id for d in engine.step() if d.finish]
    assert engine.busy
    assert engine.step() == []
    held.set()
    assert run(engine)["bound"][-1].finish is FinishReason.STOP


def test_a_request_can_be_cancelled_while_its_grammar_compiles(
    make_engine: EngineMaker, held: threading.Event
) -> None:
    engine = make_engine()
    engine.submit(request("r", JSON))
    engine.cancel("r")
    assert not engine.busy
    engine.submit(request("r", JSON))  # the name is free again
    held.set()
    assert run(engine)["r"][-1].finish is FinishReason.STOP


def test_compiling_too_long_ends_the_request(
    make_engine: EngineMaker, held: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "COMPILE_SECONDS", -1.0)
    engine = make_engine()
    engine.submit(request("r", JSON))
    (delta,) = run(engine)["r"]
    assert delta.finish is FinishReason.ERROR
    assert "not compiled within" in (delta.error or "")
    held.set()


def test_a_request_interrupted_after_its_last_token_ends_at_once(
    make_engine: EngineMaker, tokenizer: Tokenizer
) -> None:
    engine = make_engine()
    emitted = tuple(tokenizer.encode_text('{"a":true}'))
    whole = Request("r", (5,), SamplingParams(max_tokens=60), emitted_ids=emitted, grammar=JSON)
    engine.submit(whole)
    assert run(engine)["r"] == [Delta("r", (), FinishReason.STOP)]


def test_without_grammars_such_a_request_is_refused(make_engine: EngineMaker) -> None:
    engine = make_engine()
    engine._grammars = None
    with pytest.raises(RequestRefused, match="no grammars"):
        engine.submit(request("r", JSON))


def test_compiled_grammars_are_kept_and_the_oldest_forgotten(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def noting(vocabulary: Any, text: str) -> Any:
        made.append(text)
        return new_matcher(vocabulary, text)

    monkeypatch.setattr(grammar, "new_matcher", noting)
    monkeypatch.setattr(grammar, "GRAMMARS_KEPT", 2)
    compiler = GrammarCompiler(grammar_vocabulary(tiny_path, 2048, EOS))
    a, b, c = 'start: "a"', 'start: "b"', 'start: "c"'
    for text in (a, b, a, c, a, b):
        compiler.start("r", text, ())
        assert len(compiler.finished(10)) == 1
    assert made == [a, b, c, b]


def test_an_unusable_tokenizer_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: unusable for grammars"):
        grammar_vocabulary(tmp_path, 1000, EOS)


def test_errors_are_one_line_without_the_grammar(tiny_path: Path) -> None:
    vocabulary = grammar_vocabulary(tiny_path, 2048, EOS)
    with pytest.raises(GrammarError) as error:
        new_matcher(vocabulary, 'start: j\nj: %json {"not": {}}')
    assert str(error.value) == 'Unimplemented keys: ["not"]'
