"""Tokens become text: whole characters only, no stop string, and the same text however it is cut into pieces."""

from __future__ import annotations

import pytest
from conftest import tiny_tokenizer, word_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from antefix.server.text import StopStrings, Stripped, TextStream

TOKENIZER = tiny_tokenizer()
"""A byte a token, so that every character beyond ASCII is spread over tokens."""
TEXTS = st.text(st.sampled_from("ab€🏺é \n\u0301") | st.characters(codec="utf-8"), max_size=30)


def decode(ids: list[int]) -> str:
    return str(TOKENIZER.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@given(TEXTS, TEXTS)
def test_a_stream_of_tokens_is_the_text_and_has_no_broken_character(before: str, text: str) -> None:
    after = TOKENIZER(before)["input_ids"]
    stream = TextStream(decode, after)
    pieces = [stream.push(token) for token in TOKENIZER(text)["input_ids"]]
    pieces.append(stream.flush())
    assert "".join(pieces) == text
    assert stream.num_chars == len(text)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(3, 258), max_size=30))
def test_bytes_that_are_no_text_are_what_the_tokenizer_makes_of_them(ids: list[int]) -> None:
    stream = TextStream(decode)
    assert "".join([*map(stream.push, ids), stream.flush()]) == decode(ids)


def test_special_tokens_write_nothing() -> None:
    stream = TextStream(decode)
    assert [stream.push(token) for token in (*TOKENIZER("a")["input_ids"], 2, *TOKENIZER("b")["input_ids"])] == [
        "a",
        "",
        "b",
    ]


def test_a_word_keeps_the_space_before_it() -> None:
    words = word_tokenizer(["one two three"])
    stream = TextStream(lambda ids: str(words.decode(ids)), words("one")["input_ids"])
    assert "".join(map(stream.push, words("two three")["input_ids"])) == " two three"


SHORT = st.text(st.sampled_from("ab"), min_size=1, max_size=4)


@given(st.text(st.sampled_from("abc"), max_size=25), st.lists(SHORT, max_size=4), st.lists(st.integers(1, 4)))
def test_any_split_stops_at_the_same_place(text: str, stops: list[str], lengths: list[int]) -> None:
    whole, found = stopped([*text], stops)
    pieces, left = [], text
    for length in lengths:
        pieces.append(left[:length])
        left = left[length:]
    assert stopped([*pieces, left], stops) == (whole, found)
    assert text.startswith(whole)
    assert found == any(stop in text for stop in stops)
    assert not any(stop in whole for stop in stops)
    if not found:
        assert whole == text


def stopped(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    """The text that is shown, and whether a stop string was found, told a character at a time."""
    stream = StopStrings(stops)
    shown = "".join(stream.push(character) for piece in pieces for character in piece)
    one_by_one = shown + stream.flush(), stream.found
    stream = StopStrings(stops)
    shown = "".join(map(stream.push, pieces))
    assert (shown + stream.flush(), stream.found) == one_by_one
    return one_by_one


@given(st.lists(st.text(st.sampled_from("ab \n"), max_size=4), max_size=8))
def test_spaces_around_a_text_are_left_out_however_it_is_cut(pieces: list[str]) -> None:
    stripped = Stripped()
    assert "".join(map(stripped.push, pieces)) == "".join(pieces).strip()


@pytest.mark.parametrize(
    ("pieces", "stops", "shown"),
    [
        (["one. T", "wo"], [". Two"], ["one", ""]),
        (["one. T", "en"], [". Two"], ["one", ". Ten"]),
        (["a\n", "\nb"], ["\n\n"], ["a", ""]),
        (["abcd"], ["bcd", "bc"], ["a"]),
        (["abcd"], ["abcX", "bc"], ["a"]),
        (["aab", "c"], ["aabX"], ["", "aabc"]),
        (["end"], [], ["end"]),
    ],
)
def test_what_may_become_a_stop_string_waits(pieces: list[str], stops: list[str], shown: list[str]) -> None:
    stream = StopStrings(stops)
    assert [stream.push(piece) for piece in pieces] == shown
