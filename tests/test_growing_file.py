"""A growing file: what was finished is read again, whatever an interruption left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from antefix.growing_file import GrowingFile, OtherWorkError


def test_pieces_are_read_in_their_order(tmp_path: Path) -> None:
    file = GrowingFile(tmp_path / "deep" / "a.jsonl", {"seed": 1})
    assert file.read() == []
    for piece in (["é\u2028", 1], {"b": None}):
        file.add(piece)
    assert GrowingFile(file.path, {"seed": 1}).read() == [["é\u2028", 1], {"b": None}]


@pytest.mark.parametrize("cut", range(60))
def test_a_cut_anywhere_loses_the_piece_it_is_in_alone(tmp_path: Path, cut: int) -> None:
    file = GrowingFile(tmp_path / "a.jsonl", "work")
    for piece in ([0, "one"], [1, "two"], [2, "three"]):
        file.add(piece)
    content = file.path.read_bytes()
    file.path.write_bytes(content[:cut])
    whole = max(content[:cut].count(b"\n") - 1, 0)
    assert GrowingFile(file.path, "work").read() == [[0, "one"], [1, "two"], [2, "three"]][:whole]
    file.add(["more"])
    assert GrowingFile(file.path, "work").read()[whole:] == [["more"]]


def test_another_work_and_no_such_file_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    GrowingFile(path, "work").add(1)
    with pytest.raises(OtherWorkError):
        GrowingFile(path, "other work").read()
    path.write_bytes(path.read_bytes() + b"{broken\n2\n")
    with pytest.raises(ValueError, match="Expecting property name"):
        GrowingFile(path, "work").read()


@pytest.mark.parametrize("content", [b"a text of somebody else", b'{"work": "other"}\n[0, "cut', b"[1]\n[2"])
def test_what_is_not_ours_is_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(OtherWorkError):
        GrowingFile(path, "work").read()
    assert path.read_bytes() == content
