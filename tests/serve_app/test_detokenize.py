"""Incremental text equals whole text: UTF-8, stop strings, for tokens of any bytes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rayseek.serve_app.detokenize import TextStream

TOKENS = st.lists(
    st.one_of(
        st.binary(min_size=0, max_size=3),
        st.sampled_from(["ab", "a", "b", "aab", "é", "😀", "\n\n"]).map(str.encode),
        st.sampled_from(["😀", "好"]).flatmap(
            lambda c: st.integers(1, 3).map(lambda n: c.encode()[:n])
        ),
    ),
    max_size=12,
)
STOPS = st.lists(
    st.sampled_from(["a", "b", "ab", "bab", "aab", "b\n", "éa"])
    | st.text("abé😀\n\ufffd", min_size=1, max_size=4),
    max_size=4,
)


def reference(text: str, stops: list[str], include: bool) -> tuple[str, bool]:
    """Cut at the match that ends first; of those, at the one that starts first."""
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return text[: end if include else end - max(lengths)], True
    return text, False


@given(tokens=TOKENS, stops=STOPS, include=st.booleans())
def test_streamed_text_equals_whole_text(
    tokens: list[bytes], stops: list[str], include: bool
) -> None:
    stream = TextStream(lambda i: tokens[i], stop=stops, include_stop=include)
    shown = ""
    whole = b"".join(tokens).decode("utf-8", "replace")
    expected, stopped = reference(whole, stops, include)
    for index in range(len(tokens)):
        shown += stream.push(index)
        assert expected.startswith(shown)  # nothing is ever taken back
        if stream.stopped:
            break
    shown += stream.close()
    assert (shown, stream.stopped) == (expected, stopped)
    if stopped and stream.tokens:  # it stopped at the first token that completes the match
        before = b"".join(tokens[: stream.tokens - 1])
        complete = before.decode("utf-8", "ignore") if before else ""
        assert "\ufffd" in whole or not any(stop in complete for stop in stops)


@given(tokens=TOKENS)
def test_text_is_held_back_no_longer_than_needed(tokens: list[bytes]) -> None:
    """Without stop strings, all complete characters are out at once."""
    stream = TextStream(lambda i: tokens[i])
    shown = ""
    for index in range(len(tokens)):
        shown += stream.push(index)
        so_far = b"".join(tokens[: index + 1]).decode("utf-8", "replace")
        assert shown == so_far or shown + "\ufffd" == so_far
        assert stream.decoded == len(shown)
    assert shown + stream.close() == b"".join(tokens).decode("utf-8", "replace")


def test_of_stops_that_end_together_the_longest_is_cut() -> None:
    stream = TextStream(lambda i: b"xab"[i : i + 1], stop=["b", "ab"])
    assert "".join(stream.push(i) for i in range(3)) == "x" and stream.stopped


def test_overlapping_stops() -> None:
    stream = TextStream(lambda i: b"aaabab"[i : i + 1], stop=["aab", "abab"])
    assert "".join(stream.push(i) for i in range(4)) == "a" and stream.stopped


def test_stops_are_not_looked_for_before_min_tokens() -> None:
    stream = TextStream(lambda i: b"x", stop=["x"], min_tokens=3)
    assert [stream.push(0) for _ in range(4)] == ["x", "x", "x", ""]
    assert stream.stopped and stream.tokens == 4


def test_hidden_ids_have_no_text_but_count() -> None:
    stream = TextStream(lambda i: b"ab"[i : i + 1], hidden={1})
    assert stream.push(0) + stream.push(1) == "a" and stream.tokens == 2
