"""Frames: what is one, what it is made of, and their scores by hand."""

from __future__ import annotations

import pytest
from conftest import SHARED

from antefix.data import read
from antefix.data.frames import Node, brackets, parse
from antefix.metrics import score

FRAME = "[IN:GET_WEATHER will it rain [SL:LOCATION in [IN:GET_LOCATION boston ] ] now ]"


def test_a_frame_is_a_tree() -> None:
    assert parse(FRAME) == Node(
        "IN:GET_WEATHER",
        ("will", "it", "rain", Node("SL:LOCATION", ("in", Node("IN:GET_LOCATION", ("boston",)))), "now"),
    )
    root = parse(FRAME)
    assert root is not None
    assert root.words() == ("will", "it", "rain", "in", "boston", "now")
    assert sorted(brackets(root)) == [("IN:GET_LOCATION", 4, 5), ("IN:GET_WEATHER", 0, 6), ("SL:LOCATION", 3, 5)]


@pytest.mark.parametrize(
    "text",
    ["", "words alone", "[IN:A x", "[IN:A x ] ]", "[IN:A x ] y", "[SL:A x ]", "[IN:A [IN:B x ] ]",
     "[IN:A [SL:B [SL:C x ] ] ]", "[IN:a x ]", "[ IN:A x ]", "[IN:A x ] [IN:A x ]"],
)  # fmt: skip
def test_what_is_no_frame(text: str) -> None:
    assert parse(text) is None


def test_scores_by_hand() -> None:
    """One of two brackets right of the first, all of the second, none of the third, which is no frame."""
    references = [["[IN:A a [SL:B b ] ]"], ["[IN:A a ]"], ["[IN:A a ]"]]
    texts = ["[IN:A a [SL:C b ] ]", "[IN:A  a]", "[IN:A a"]
    found = score(references, texts, ["well_formed", "frame_f1", "accuracy"])
    assert found["well_formed"] == pytest.approx(2 / 3)
    assert found["frame_f1"] == pytest.approx(2 * 2 / (3 + 4))
    assert found["accuracy"] == 0.0
    assert score([["[IN:A a ]"]], ["[IN:A  a ]"], ["accuracy"])["accuracy"] == 1.0


@pytest.mark.skipif(not (SHARED / "data" / "top_english_small").is_dir(), reason="the data is not here")
def test_real_frames_are_all_well_formed() -> None:
    path = SHARED / "data" / "top_english_small" / "validation.tsv"
    examples = read(str(path), source_column="utterance", target_column="semantic_parse")
    assert len(examples) > 1000
    assert all(parse(target) is not None for example in examples for target in example.targets)
