"""Files of hypotheses and references: every format that is read, and a line for every file that cannot be."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from conftest import SHARED

from antefix.data import Table
from antefix.errors import AntefixError, DataError, MetricError
from antefix.generated_file import GeneratedFile
from antefix.metrics.files import References, read_hypotheses, read_references

GROUPS = [["A b.", "B, a."], ["C é d."]]
E2E = SHARED / "data" / "e2e_nlg" / "e2e-dataset.zip"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, content: str) -> str:
    Path(name).write_bytes(content.encode())
    return name


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def references_for(count: int) -> References:
    return References(name="refs.txt", groups=[["a"]] * count, sources=None)


class TestReferences:
    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("refs.txt", "A b.\nB, a.\n\nC é d.\n"),
            ("refs", "A b.\r\n B, a.\t\r\n \r\nC é d.\r\n\r\n\r\n"),
            ("refs.en", "\ufeffA b.\nB, a.\n\nC é d."),
            ("refs.jsonl", lines({"references": GROUPS[0]}, {"references": GROUPS[1]})),
            ("refs.jsonl", lines({"index": 1, "targets": GROUPS[1]}, {"index": 0, "targets": GROUPS[0]})),
            ("refs.json", json.dumps([{"id": "x", "references": GROUPS[0]}, {"id": "y", "references": GROUPS[1]}])),
            ("refs.jsonl", lines({"source": "x", "references": GROUPS[0]}, {"source": "y", "references": GROUPS[1]})),
            ("menus.csv", 'name,text\nx,A b.\ny,C é d.\nx,"B, a."\n'),
        ],
    )
    def test_of_every_format(self, name: str, content: str) -> None:
        assert read_references(write(name, content)).groups == GROUPS

    def test_of_a_text_file_without_a_blank_line_are_one_an_input(self) -> None:
        assert read_references(write("refs.txt", "one\ntwo\n")).groups == [["one"], ["two"]]
        assert read_references(write("refs.jsonl", lines({"target": "one"}, {"target": "one"}))).groups == [["one"]] * 2

    def test_may_be_gzipped(self) -> None:
        Path("refs.txt.gz").write_bytes(gzip.compress(b"one\ntwo\n\nthree\n"))
        assert read_references("refs.txt.gz").groups == [["one", "two"], ["three"]]

    def test_of_a_data_file_come_with_their_tables(self) -> None:
        found = read_references(write("menus.jsonl", lines({"table": {"name": "Fern"}, "target": "Fern."})))
        assert found.tables() == [Table((("name", "Fern"),))]

    def test_of_one_split(self) -> None:
        rows = [{"source": s, "target": t, "split": p} for s, t, p in [("x", "A", "dev"), ("y", "B", "test")]]
        write("all.jsonl", lines(*rows))
        assert read_references("all.jsonl", "test").groups == read_references("all.jsonl::test").groups == [["B"]]
        with zipfile.ZipFile("all.zip", "w") as archive:
            archive.writestr("dev.csv", "name,text\nx,A\n")
            archive.writestr("test.csv", "name,text\ny,B\n")
        assert read_references("all.zip", "test").groups == read_references("all.zip::test.csv").groups == [["B"]]

    @pytest.mark.skipif(not E2E.is_file(), reason="the E2E data is not here")
    def test_of_the_e2e_challenge(self) -> None:
        found = read_references(str(E2E), "test")
        assert (len(found.groups), sum(map(len, found.groups)), len(found.tables())) == (630, 4693, 630)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("refs.txt", "", "refs.txt: the file is empty"),
            ("refs.txt", "\none\n", "refs.txt, line 1: an input without a reference"),
            ("refs.txt", "one\n\n \ntwo\n", "refs.txt, line 3: an input without a reference"),
            ("refs.jsonl", lines({"references": ["a"]}, {"references": []}), "refs.jsonl, line 2: 'references' is an"),
            ("refs.jsonl", lines({"references": ["a"]}, {"refs": ["a"]}), "refs.jsonl, line 2: no 'references'"),
            ("refs.jsonl", lines({"references": [" "]}), "refs.jsonl, line 1: 'references' is empty"),
            ("refs.jsonl", lines({"target": 3}), "refs.jsonl, line 1: 'target' must be a text"),
            ("refs.jsonl", '{"references": ["a"}\n', "refs.jsonl, line 1: not JSON"),
            ("refs.jsonl", "\n", "refs.jsonl: the file is empty"),
            ("refs.json", "[]", "refs.json: the file has no rows"),
            ("e2e.csv", "MR\nname[x]\n", "e2e.csv, line 2: no reference among the columns MR"),
        ],
    )
    def test_that_cannot_be_read_name_file_and_line(self, name: str, content: str, message: str) -> None:
        with pytest.raises(DataError) as error:
            read_references(write(name, content))
        assert message in str(error.value)
        assert "\n" not in str(error.value)

    def test_that_are_no_utf_8_name_the_line(self) -> None:
        Path("refs.txt").write_bytes(b"one\nt\xe9\n")
        with pytest.raises(DataError, match=r"refs.txt, line 2: not UTF-8"):
            read_references("refs.txt")

    def test_that_are_not_there(self) -> None:
        for name in ("refs.txt", "refs.csv", "refs.zip::test"):
            with pytest.raises(DataError, match="no such file"):
                read_references(name)

    def test_of_a_text_file_have_no_split_and_no_tables(self) -> None:
        write("refs.txt", "one\n")
        with pytest.raises(DataError, match=r"refs.txt: a text file has no split 'test': leave it out"):
            read_references("refs.txt", "test")
        with pytest.raises(MetricError, match=r"refs.txt: table values can only be checked against tables"):
            read_references("refs.txt").tables()
        write("talk.jsonl", lines({"source": "x", "target": "y"}))
        with pytest.raises(MetricError, match=r"talk.jsonl: table values can only be checked"):
            read_references("talk.jsonl").tables()


class TestHypotheses:
    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("texts.txt", "one\n\n three\n"),
            ("texts.out", "one\r\n\r\nthree"),
            ("texts.jsonl", lines({"text": "one"}, {"text": ""}, {"text": "three"})),
            (
                "texts.jsonl",
                lines(
                    {"index": 10, "text": "three"},
                    {"index": 2, "text": "", "source": {"name": "x"}},
                    {"index": 1, "where": "menus.csv, line 2", "text": "one"},
                ),
            ),
        ],
    )
    def test_of_every_format(self, name: str, content: str) -> None:
        assert read_hypotheses(write(name, content), references_for(3)) == ["one", "", "three"]

    @pytest.mark.parametrize("name", ["texts.jsonl", "texts.txt"])
    def test_written_by_generate(self, name: str) -> None:
        file = GeneratedFile(Path(name), ["task"])
        for index, text in [(2, "three"), (0, "one"), (1, "")]:
            file.add(index, text)
        file.finish(["a", "b", "c"])
        assert read_hypotheses(name, references_for(3)) == ["one", "", "three"]

    def test_that_are_too_few_or_too_many_name_both_numbers(self) -> None:
        write("texts.txt", "one\ntwo\n")
        with pytest.raises(MetricError, match=r"texts.txt has 2 texts, refs.txt has references for 3 inputs: one text"):
            read_hypotheses("texts.txt", references_for(3))
        references = read_references(write("menus.csv", "name,text\nx,A\nx,B\n"))
        with pytest.raises(MetricError, match="for 1 inputs, where rows with an equal source are one input: one text"):
            read_hypotheses("texts.txt", references)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("texts.jsonl", lines({"text": "a"}, {"txt": "b"}), "texts.jsonl, line 2: no 'text': did you mean 'txt'?"),
            ("texts.jsonl", lines({"text": ["a"]}), "texts.jsonl, line 1: 'text' must be a text, this is a list"),
            ("texts.jsonl", lines({"text": None}), "texts.jsonl, line 1: 'text' must be a text, this is null"),
            (
                "texts.jsonl",
                lines({"index": 0, "text": "a"}, {"index": 0, "text": "b"}),
                "texts.jsonl, line 2: index 0 occurs twice, first in texts.jsonl, line 1",
            ),
            ("texts.jsonl", lines({"index": 0, "text": "a"}, {"text": "b"}), "texts.jsonl, line 2: no 'index'"),
            ("texts.jsonl", lines({"index": "0", "text": "a"}), "line 1: 'index' must be a whole number, this is '0'"),
            ("texts.jsonl", lines({"index": True, "text": "a"}), "'index' must be a whole number, this is 'True'"),
            ("texts.jsonl", "one\n", "texts.jsonl, line 1: not JSON"),
            ("texts.csv", "text\na\n", "texts.csv: texts to be scored come one a line, or as JSON lines with a 'text'"),
            ("texts.txt", "", "texts.txt: the file is empty"),
        ],
    )
    def test_that_cannot_be_read_name_file_and_line(self, name: str, content: str, message: str) -> None:
        with pytest.raises(AntefixError) as error:
            read_hypotheses(write(name, content), references_for(2))
        assert message in str(error.value)
        assert "\n" not in str(error.value)
