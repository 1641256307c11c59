"""Data files become examples, and every bad row is one line that names file and line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from conftest import SHARED
from timing import at_best

from antefix.data import Chat, Example, Message, Table, Triples, read, sample_pairs, split_examples
from antefix.data.readers import READERS
from antefix.errors import DataError

needs_shared = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the real data sets are not here")
MENUS = "name,price,text\nFern,4 €,Fern costs 4 €.\nMill,,Mill Inn.\n"


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def jsonl(folder: Path, *rows: Any, name: str = "rows.jsonl") -> str:
    return write(folder, name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def zipped(folder: Path, members: dict[str, str], name: str = "set.zip") -> str:
    with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return str(folder / name)


class TestRealSets:
    """The published sets have the numbers of sources and texts that their papers and the files' README state."""

    @needs_shared
    @pytest.mark.parametrize(
        ("file", "split", "num_sources", "num_texts"),
        [
            ("e2e_nlg/e2e-dataset.zip::trainset.csv", None, 4862, 42061),
            ("e2e_nlg/e2e-dataset.zip", "dev", 547, 4672),
            ("e2e_nlg/e2e-dataset.zip", "test", 630, 4693),
            ("e2e_nlg/e2e-dataset.zip::testset.csv", None, 630, 0),
            ("e2e_nlg/cleaned/devel-fixed.no-ol.csv.gz", None, 1484, 4299),
            ("e2e_nlg/cleaned/test-fixed.csv.gz", None, 1847, 4693),
            # Entries with equal triples are one example: 6,940, 872 and 1,862 entries; 2,768 and 5,097 of DART.
            ("webnlg/train.jsonl.gz", None, 6893, 18102),
            ("webnlg/dev.jsonl.gz", None, 871, 2268),
            ("webnlg/test.jsonl.gz", "test", 1862, 4928),
            ("dart/dart-v1.1.1-dev.jsonl.gz", None, 2721, 6980),
            # One of DART's 12,552 texts is empty.
            ("dart/dart-v1.1.1-test.jsonl.gz", None, 4159, 12551),
            ("summarisation/gum_summaries.jsonl.gz::train", None, 79, 79),
        ],
    )
    def test_counts(self, file: str, split: str | None, num_sources: int, num_texts: int) -> None:
        examples = read(SHARED / "data" / file, split=split)
        assert (len(examples), sum(len(e.targets) for e in examples)) == (num_sources, num_texts)

    @needs_shared
    def test_an_e2e_row(self) -> None:
        first = read(SHARED / "data/e2e_nlg/e2e-dataset.zip::devset.csv")[0]
        assert isinstance(first.source, Table)
        assert [field for field, _ in first.source.fields] == ["name", "area", "familyFriendly"]
        assert first.where.endswith("e2e-dataset.zip::devset.csv, line 2")

    @needs_shared
    def test_webnlg_keeps_what_else_an_entry_says(self) -> None:
        first = read(SHARED / "data/webnlg/test.jsonl.gz")[0]
        assert first.source == Triples((("Abilene_Regional_Airport", "cityServed", "Abilene,_Texas"),))
        assert first.labels == {"split": "test", "eid": "Id1", "category": "Airport", "seen": "True"}

    @needs_shared
    def test_only_good_texts_of_webnlg(self) -> None:
        dev = SHARED / "data/webnlg/dev.jsonl.gz"
        assert sum(len(e.targets) for e in read(dev, only_good=True)) == 2258

    @needs_shared
    def test_all_of_e2e_takes_little_longer_than_its_rows_alone(self) -> None:
        path = SHARED / "data/e2e_nlg/e2e-dataset.zip"

        def rows_alone() -> None:
            with zipfile.ZipFile(path) as archive:
                name = next(n for n in archive.namelist() if n.endswith("trainset.csv"))
                list(csv.reader(io.StringIO(archive.read(name).decode())))

        assert at_best(lambda: read(f"{path}::trainset.csv")) < 20 * at_best(rows_alone)


class TestShapes:
    """What a row may look like."""

    def test_e2e_rows_with_one_meaning_are_one_example(self, tmp_path: Path) -> None:
        text = (
            "mr,ref\r\n"
            '"name[Mill Inn], near[Café]","Two\nlines."\r\n'
            "name[Fern],Fern.\r\n"
            '"name[Mill Inn], near[Café]","By the café, ""Mill Inn""."\r\n'
        )
        mill, fern = read(write(tmp_path, "e2e.csv", text))
        assert mill.source == Table((("name", "Mill Inn"), ("near", "Café")))
        assert mill.targets == ("Two\nlines.", 'By the café, "Mill Inn".')
        assert fern.where.endswith("e2e.csv, line 4")

    def test_e2e_without_references(self, tmp_path: Path) -> None:
        (example,) = read(write(tmp_path, "test.csv", "MR\nname[Fern]\n"))
        assert example == Example(source=Table((("name", "Fern"),)), where=f"{tmp_path}/test.csv, line 2")

    def test_triples_as_text_or_as_lists(self, tmp_path: Path) -> None:
        row = {"triples": ["a | r | b", ["c", "s", "d"]], "lexs": [{"text": "A."}, {"text": ""}, {"text": "B."}]}
        (example,) = read(jsonl(tmp_path, row))
        assert example.source == Triples((("a", "r", "b"), ("c", "s", "d")))
        assert example.targets == ("A.", "B.")

    def test_a_named_source_with_one_or_several_targets(self, tmp_path: Path) -> None:
        rows = [{"source": " hi ", "target": "a"}, {"source": "ho", "targets": ["b", "c"], "id": 7}]
        first, second = read(jsonl(tmp_path, *rows))
        assert (first.source, first.targets) == ("hi", ("a",))
        assert (second.targets, second.labels) == (("b", "c"), {"id": "7"})

    @pytest.mark.parametrize("table", [{"name": "Fern", "price": 4, "open": True, "near": None}, [
        ["name", "Fern"], ["price", "4"], ["open", "true"], ["near", " "]]])  # fmt: skip
    def test_a_table_as_object_or_pairs(self, tmp_path: Path, table: Any) -> None:
        (example,) = read(jsonl(tmp_path, {"table": table, "target": "x"}))
        assert example.source == Table((("name", "Fern"), ("price", "4"), ("open", "true")))

    def test_columns_without_a_source_form_a_table(self, tmp_path: Path) -> None:
        fern, mill = read(write(tmp_path, "menus.csv", MENUS))
        assert fern.source == Table((("name", "Fern"), ("price", "4 €")))
        assert mill.source == Table((("name", "Mill"),)), "an empty cell is no field"
        assert mill.where == f"{tmp_path}/menus.csv, line 3"

    def test_columns_can_be_named(self, tmp_path: Path) -> None:
        file = write(tmp_path, "menus.csv", "a,b,c\n1,2,3\n")
        assert read(file, source_column="c", target_column="a")[0] == Example(
            source="3", targets=("1",), where=f"{file}, line 2", labels={"b": "2"}
        )
        assert read(file, table_columns=["c", "a"], target_column="b")[0].source == Table((("c", "3"), ("a", "1")))

    def test_a_text_and_its_class(self, tmp_path: Path) -> None:
        (example,) = read(write(tmp_path, "films.csv", "text,label\nA joy.,good\n"))
        assert (example.source, example.targets) == ("A joy.", ("good",))

    def test_sources_alone_are_for_generation(self, tmp_path: Path) -> None:
        assert read(write(tmp_path, "a.csv", "text\nhello\n"))[0] == Example(
            source="hello", where=f"{tmp_path}/a.csv, line 2"
        )
        assert read(write(tmp_path, "b.csv", "name,price\nFern,4\n"))[0].targets == ()

    def test_tsv(self, tmp_path: Path) -> None:
        (example,) = read(write(tmp_path, "a.tsv", 'source\ttarget\na, b\tsay "hi"\n'))
        assert (example.source, example.targets) == ("a, b", ('say "hi"',))

    @pytest.mark.parametrize(
        ("row", "source", "target"),
        [
            (
                {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"},
                              {"role": "assistant", "content": "Hello!"}]},
                Chat((Message("system", "Be kind."), Message("user", "Hi"))), "Hello!",
            ),
            (
                {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"},
                                   {"from": "human", "value": "And?"}, {"from": "gpt", "value": "Bye."}]},
                Chat((Message("user", "Hi"), Message("assistant", "Hello!"), Message("user", "And?"))), "Bye.",
            ),
            (
                {"instruction": "Greet.", "input": "in French", "output": "Bonjour !"},
                Chat((Message("user", "Greet.\n\nin French"),)), "Bonjour !",
            ),
            ({"instruction": "Greet.", "input": "", "output": "Hi."}, Chat((Message("user", "Greet."),)), "Hi."),
            ({"instruction": "Greet.", "input": None, "output": "Hi."}, Chat((Message("user", "Greet."),)), "Hi."),
        ],
    )  # fmt: skip
    def test_conversations(self, tmp_path: Path, row: Any, source: Chat, target: str) -> None:
        (example,) = read(jsonl(tmp_path, row))
        assert (example.source, example.targets) == (source, (target,))

    def test_a_conversation_that_ends_with_the_user_has_no_target(self, tmp_path: Path) -> None:
        (example,) = read(jsonl(tmp_path, {"messages": [{"role": "user", "content": "Hi"}]}))
        assert example == Example(source=Chat((Message("user", "Hi"),)), where=f"{tmp_path}/rows.jsonl, line 1")


class TestFiles:
    """What a file may be."""

    def test_gzip(self, tmp_path: Path) -> None:
        file = write(tmp_path, "menus.csv.gz", gzip.compress(MENUS.encode()))
        assert [e.where for e in read(file)] == [f"{file}, line 2", f"{file}, line 3"]

    def test_a_byte_order_mark_and_blank_lines_do_no_harm(self, tmp_path: Path) -> None:
        file = write(tmp_path, "a.csv", b"\xef\xbb\xbf\r\nsource,target\r\n\r\na,b\r\n\r\n")
        assert read(file) == [Example(source="a", targets=("b",), where=f"{file}, line 4")]

    def test_a_json_array_names_the_lines_of_its_objects(self, tmp_path: Path) -> None:
        text = '[\n  {"source": "a",\n   "target": "b"},\n\n  {"source": "c", "target": "d"}\n]\n'
        file = write(tmp_path, "a.json", text)
        assert [(e.source, e.where) for e in read(file)] == [("a", f"{file}, line 2"), ("c", f"{file}, line 5")]

    def test_a_member_of_a_zip_by_name_or_by_split(self, tmp_path: Path) -> None:
        other = MENUS.replace("Fern", "Dill")
        file = zipped(tmp_path, {"set/trainset.csv": MENUS, "set/devset.csv": other, "__MACOSX/set/._devset.csv": "?"})
        for name, split in ((f"{file}::devset.csv", None), (f"{file}::set/devset.csv", None), (f"{file}::dev", None),
                            (file, "dev")):  # fmt: skip
            assert read(name, split=split)[0].where == f"{file}::devset.csv, line 2"
            assert read(name, split=split)[0].targets == ("Dill costs 4 €.",)

    def test_a_zip_with_one_file_needs_no_name(self, tmp_path: Path) -> None:
        assert len(read(zipped(tmp_path, {"menus.csv": MENUS, "readme.txt": "about"}))) == 2

    def test_the_split_column_chooses_rows(self, tmp_path: Path) -> None:
        rows = [{"split": s, "source": s, "target": "x"} for s in ("train", "dev", "train ", "dev")]
        file = jsonl(tmp_path, *rows)
        assert [e.targets for e in read(file, split="dev")] == [("x", "x")]
        assert read(f"{file}::dev") == read(file, split="dev")
        inside = zipped(tmp_path, {"rows.jsonl": Path(file).read_text()})
        assert [e.labels for e in read(f"{inside}::rows.jsonl", split="dev")] == [{"split": "dev"}]

    def test_only_as_much_is_read_as_is_asked_for(self, tmp_path: Path) -> None:
        """The format is told by the first row; a reader that is left early has read no more."""
        from antefix.data.readers import format_of, rows_of

        file = write(tmp_path, "a.csv", b"mr,ref\nname[A],B\n" + b"name[A],B\n" * 50_000 + b"\xff broken")
        rows = rows_of(file)
        assert format_of(next(rows)[1]) == "e2e"
        rows.close()  # type: ignore[attr-defined]
        with pytest.raises(DataError, match="line 50003"):
            read(file)

    def test_reading_needs_neither_torch_nor_transformers(self, tmp_path: Path) -> None:
        file = write(tmp_path, "menus.csv", MENUS)
        code = (
            f"import sys; from antefix.data import read; read({file!r});"
            "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


ROW = '{"source": "a", "target": "b"}\n'
BAD_FILES: dict[str, tuple[str, str | bytes, str]] = {
    # what is wrong: the file's name, its content, what the message says after the folder
    "an open quote": ("a.csv", 'source,target\na,b\na,"b\n', "a.csv, line 3: broken csv (unexpected end of data)"),
    "a stray quote": ("a.csv", 'source,target\na,"b" c\n', "a.csv, line 2: broken csv ("),
    "too many cells": ("a.csv", "source,target\na,b\na,b,c\n", "a.csv, line 3: 3 cells, the header has 2"),
    "too few cells": ("a.csv", "source,target\na\n", "a.csv, line 2: 1 cells, the header has 2"),
    "a column twice": ("a.csv", "source,source\na,b\n", "a.csv, line 1: the header needs distinct, non-empty column"),
    "a column without a name": ("a.csv", "source,,\na,b,c\n", "a.csv, line 1: the header needs distinct, non-empty"),
    "semicolons": ("a.csv", "source;target\na;b\n", "a.csv, line 1: the cells are separated by ';'; a .csv needs"),
    "tabs in a csv": ("a.csv", "source\ttarget\na\tb\n", "a.csv, line 1: the cells are separated by '\\t'; a .csv"),
    "a header only": ("a.csv", "source,target\n", "a.csv: the file has no rows"),
    "an empty file": ("a.csv", "", "a.csv: the file is empty"),
    "blank lines only": ("a.jsonl", " \n\n", "a.jsonl: the file is empty"),
    "an empty array": ("a.json", "[ ]", "a.json: the file has no rows"),
    "no UTF-8": ("a.csv", b"source,target\na,b\n" + b"caf\xe9,b\n", "a.csv, line 3: not UTF-8 (byte 0xe9)"),
    "UTF-16": ("a.csv", "source,target\n".encode("utf-16"), "a.csv, line 1: not UTF-8 (byte 0xff); save the file as"),
    "not JSON": ("a.jsonl", ROW + "{'source': 1}\n", "a.jsonl, line 2: not JSON (Expecting property name enclosed in"),
    "half a line": ("a.jsonl", ROW + ROW[:12], "a.jsonl, line 2: not JSON (Unterminated string starting at at column"),
    "deep JSON": ("a.jsonl", "[" * 100_000, "a.jsonl, line 1: not JSON ("),
    "no object": ("a.jsonl", ROW + '"text"\n', "a.jsonl, line 2: a row must be a JSON object, this is a text"),
    "no object in an array": ("a.json", f"[{ROW},\n7]", "a.json, line 3: a row must be a JSON object, this is a numbe"),
    "an array that stops": ("a.json", f"[{ROW},", "a.json, line 2: not JSON ("),
    "an array without a comma": ("a.json", f"[{ROW}{ROW}]", "a.json, line 2: not JSON (the array is not ended, or goe"),
    "text after an array": ("a.json", f"[{ROW}] and", "a.json, line 2: not JSON (the array is not ended, or goes on"),
    "half a character": ("a.jsonl", ROW.replace("a", "\\ud83d"), "a.jsonl, line 1: half a character ('\\ud83d' alone)"),
    "an empty target": ("a.jsonl", ROW + '{"source": "a", "target": " "}\n', "a.jsonl, line 2: 'target' is empty"),
    "an empty source": ("a.csv", "source,target\n,b\n", "a.csv, line 2: 'source' is empty"),
    "an empty meaning": ("a.csv", "mr,ref\n,b\n", "a.csv, line 2: 'mr' is empty"),
    "no target in a list": ("a.jsonl", '{"source": "a", "targets": []}', "a.jsonl, line 1: 'targets' is an empty list"),
    "an empty one in a list": ("a.jsonl", '{"source": "a", "targets": ["b", ""]}', "a.jsonl, line 1: 'targets' is emp"),
    "an empty table": ("a.csv", "name,price,text\n,,b\n", "a.csv, line 2: every field of the table is empty"),
    "a target that is a number": (
        "a.jsonl", '{"source": "a", "target": 1}', "a.jsonl, line 1: 'target' must be a text, this is a number: put i"),
    "a target that is null": (
        "a.jsonl", '{"source": "a", "target": null}', "a.jsonl, line 1: 'target' must be a text, this is null"),
    "a table that is none": (
        "a.jsonl", '{"table": ["ab"], "target": "b"}', "a.jsonl, line 1: a table must be an object or a list of [fiel"),
    "a table in a table": (
        "a.jsonl", '{"table": {"a": {}}, "target": "b"}', "a.jsonl, line 1: the value of 'a' must be a text or a numb"),
    "a field without a name": (
        "a.jsonl", '{"table": {" ": "x"}, "target": "b"}', "a.jsonl, line 1: every field of a table needs a name"),
    "a row without a target": (
        "a.jsonl", ROW + '{"source": "c"}\n', "a.jsonl, line 2: this row has no target, "),
    "a row with another source": (
        "a.jsonl", ROW + '{"src": "c", "target": "b"}\n', "a.jsonl, line 2: this row's source is of another kind than"),
    "no meaning": ("a.csv", "mr,ref\nMill Inn,b\n", "a.csv, line 2: 'Mill Inn' is no meaning like name[Mill Inn], foo"),
    "no triple": ("a.jsonl", '{"triples": ["a | b"], "lexs": []}', "a.jsonl, line 1: 'a | b' is no triple 'subject |"),
    "no triples": ("a.jsonl", '{"triples": [], "lexs": []}', "a.jsonl, line 1: there is no triple in the list"),
    "triples that are none": ("a.jsonl", '{"triples": "x"}', "a.jsonl, line 1: triples must be a list, this is a text"),
    "no texts": ("a.jsonl", '{"triples": ["a | r | b"], "lexs": []}', "a.jsonl, line 1: 'lexs' is an empty list"),
    "texts that are none": (
        "a.jsonl", '{"triples": ["a | r | b"], "lexs": ["x"]}', "a.jsonl, line 1: every entry of 'lexs' must be an ob"),
    "one text, empty": (
        "a.jsonl", '{"triples": ["a | r | b"], "lexs": [{"text": ""}]}', "a.jsonl, line 1: 'text' is empty"),
    "no turns": ("a.jsonl", '{"messages": []}', "a.jsonl, line 1: 'messages' is an empty list"),
    "an unknown role": (
        "a.jsonl", '{"messages": [{"role": "bot", "content": "x"}]}', "a.jsonl, line 1: a turn needs 'role', one of s"),
    "a role that is a list": (
        "a.jsonl", '{"messages": [{"role": ["user"], "content": "x"}]}', "a.jsonl, line 1: a turn needs 'role', one"),
    "a turn that is none": ("a.jsonl", '{"conversations": ["x"]}', "a.jsonl, line 1: a turn needs 'from', one of syst"),
    "a turn of parts": (
        "a.jsonl", '{"messages": [{"role": "user", "content": [1]}]}', "a.jsonl, line 1: 'content' must be a text, th"),
    "no question": (
        "a.jsonl", '{"messages": [{"role": "assistant", "content": "x"}]}', "a.jsonl, line 1: the conversation has an"),
    "no answer": (
        "a.jsonl", '{"instruction": "x", "output": "y"}\n{"instruction": "z"}', "a.jsonl, line 2: this row has no tar"),
    "another kind of file": ("a.xlsx", "x", "a.xlsx: unknown kind of file; known are .csv, .tsv, .jsonl, "),
    "no gzip": ("a.csv.gz", MENUS, "a.csv.gz: cannot be read (Not a gzipped file"),
    "half a gzip": ("a.csv.gz", gzip.compress(MENUS.encode())[:30], "a.csv.gz: cannot be read ("),
    "no zip": ("a.zip", MENUS, "a.zip: cannot be read (File is not a zip file)"),
}  # fmt: skip


class TestBadFiles:
    @pytest.mark.parametrize("what", BAD_FILES)
    def test_one_line_names_file_and_line(self, tmp_path: Path, what: str) -> None:
        name, content, message = BAD_FILES[what]
        file = write(tmp_path, name, content)
        with pytest.raises(DataError) as caught:
            read(file)
        assert str(caught.value).startswith(f"{tmp_path}/{message}")
        assert "\n" not in str(caught.value)

    def test_no_such_file(self, tmp_path: Path) -> None:
        for name in ("none.csv", "none.zip", "none.zip::a.csv"):
            with pytest.raises(DataError, match=r"none\.(csv|zip): no such file"):
                read(tmp_path / name)

    def test_a_zip_with_several_files_needs_a_name(self, tmp_path: Path) -> None:
        file = zipped(tmp_path, {"a.csv": MENUS, "b.csv": MENUS})
        for name in (file, f"{file}::c.csv"):
            with pytest.raises(
                DataError, match=r"say which file inside is meant, as set.zip::NAME \(it holds a.csv, b"
            ):
                read(name)
        with pytest.raises(DataError, match="it holds no data file"):
            read(zipped(tmp_path, {"readme.txt": "x"}, name="empty.zip"))

    def test_a_missing_column_names_the_nearest(self, tmp_path: Path) -> None:
        file = write(tmp_path, "menus.csv", MENUS)
        for options in ({"target_column": "texts"}, {"source_column": "texts"}, {"table_columns": ["name", "texts"]}):
            with pytest.raises(DataError, match=r"line 2: no 'texts': did you mean 'text'\? Known: name, price, text"):
                read(file, **options)  # type: ignore[arg-type]
        with pytest.raises(DataError, match="source_column and table_columns exclude each other"):
            read(file, source_column="name", table_columns=["price"])

    def test_an_unknown_format_or_option_names_the_nearest(self, tmp_path: Path) -> None:
        file = write(tmp_path, "menus.csv", MENUS)
        with pytest.raises(
            DataError, match=f"unknown format 'plane': did you mean 'plain'.*{', '.join(sorted(READERS))}"
        ):
            read(file, format="plane")
        with pytest.raises(DataError, match=r"the reader 'plain' has no option 'target': did you mean 'target_column'"):
            read(file, target="text")

    def test_the_wrong_format(self, tmp_path: Path) -> None:
        file = write(tmp_path, "menus.csv", MENUS)
        for format, missing in (("e2e", "mr"), ("triples", "triples"), ("chat", "messages")):
            with pytest.raises(DataError, match=f"menus.csv, line 2: no '{missing}': .*Known: name, price, text"):
                read(file, format=format)

    def test_a_split_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="line 2: no column 'split', so split 'dev' cannot be told apart"):
            read(write(tmp_path, "menus.csv", MENUS), split="dev")
        file = jsonl(tmp_path, {"split": "train", "source": "a", "target": "b"})
        with pytest.raises(DataError, match=r"no row of split 'trian': did you mean 'train'\?"):
            read(f"{file}::trian")
        with pytest.raises(DataError, match="two splits are asked for, 'a' and 'b'"):
            read(f"{file}::a", split="b")

    def test_nothing_left(self, tmp_path: Path) -> None:
        row = {"triples": ["a | r | b"], "lexs": [{"comment": "toFix", "text": "x"}]}
        with pytest.raises(DataError, match=r"no row is left by \{'only_good': True\}"):
            read(jsonl(tmp_path, row), only_good=True)


class TestHub:
    """A data set of the hub, from its local copy: the same code path, without the network."""

    @pytest.fixture(autouse=True)
    def own_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        datasets.disable_progress_bars()

    @pytest.fixture
    def folder(self, tmp_path: Path) -> str:
        (tmp_path / "set").mkdir()
        jsonl(tmp_path / "set", {"source": "a", "target": "b"}, {"source": "c", "target": "d"}, name="train.jsonl")
        jsonl(tmp_path / "set", {"source": "e", "target": "f"}, name="validation.jsonl")
        return f"hf:{tmp_path}/set"

    def test_rows(self, folder: str) -> None:
        assert read(folder)[1] == Example(source="c", targets=("d",), where=f"{folder}, row 2")
        for name, split in ((folder, "validation"), (f"{folder}::validation", None)):
            assert [e.source for e in read(name, split=split)] == ["e"]

    def test_the_format_is_found_as_in_files(self, tmp_path: Path) -> None:
        (tmp_path / "talks").mkdir()
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
        jsonl(tmp_path / "talks", {"messages": turns}, name="train.jsonl")
        assert read(f"hf:{tmp_path}/talks")[0].targets == ("Hello!",)
        write(tmp_path / "talks", "train.csv", MENUS)
        (tmp_path / "talks/train.jsonl").unlink()
        assert read(f"hf:{tmp_path}/talks", table_columns=["name"])[0].source == Table((("name", "Fern"),))

    def test_bad_rows_are_named(self, tmp_path: Path) -> None:
        (tmp_path / "bad").mkdir()
        jsonl(tmp_path / "bad", {"source": "a", "target": "b"}, {"source": "c", "target": None}, name="train.jsonl")
        with pytest.raises(DataError, match="bad, row 2: 'target' must be a text, this is null"):
            read(f"hf:{tmp_path}/bad")

    def test_what_cannot_be_loaded_is_one_line(self, folder: str) -> None:
        for name, reason in (
            ("hf:nobody/nothing", "Couldn't reach 'nobody/nothing' on the Hub"),
            (f"{folder}::test", 'Unknown split "test"'),
        ):
            with pytest.raises(DataError, match="the data set cannot be loaded") as caught:
                read(name)
            assert reason in str(caught.value)
            assert "\n" not in str(caught.value)
        with pytest.raises(DataError, match="hf:: name a data set, as hf:owner/name"):
            read("hf:")


class TestSampling:
    EXAMPLES = tuple(Example(source=str(n), targets=tuple(f"{n}.{k}" for k in range(n % 4))) for n in range(40))

    def test_whole_sources_until_the_number_is_reached(self) -> None:
        drawn = sample_pairs(self.EXAMPLES, 25, seed=3)
        assert sum(len(e.targets) for e in drawn) == 25
        whole = {e.source: e.targets for e in self.EXAMPLES}
        assert all(e.targets == whole[e.source] for e in drawn[:-1])
        assert drawn[-1].targets == whole[drawn[-1].source][: len(drawn[-1].targets)]
        assert len({e.source for e in drawn}) == len(drawn)

    def test_the_seed_decides(self) -> None:
        assert sample_pairs(self.EXAMPLES, 25, seed=3) == sample_pairs(self.EXAMPLES, 25, seed=3)
        assert sample_pairs(self.EXAMPLES, 25, seed=3) != sample_pairs(self.EXAMPLES, 25, seed=4)

    def test_a_larger_draw_begins_with_the_smaller_one(self) -> None:
        small, large = (sample_pairs(self.EXAMPLES, n, seed=3) for n in (10, 40))
        assert large[: len(small) - 1] == small[:-1]

    def test_too_few_pairs(self) -> None:
        with pytest.raises(DataError, match="61 pairs were asked for, the data has 60"):
            sample_pairs(self.EXAMPLES, 61, seed=0)

    def test_a_split_by_source(self) -> None:
        train, dev = split_examples(self.EXAMPLES, 0.1, seed=5)
        assert (len(train), len(dev)) == (36, 4)
        assert sorted([*train, *dev], key=lambda e: int(str(e.source))) == list(self.EXAMPLES)
        assert (train, dev) == split_examples(self.EXAMPLES, 0.1, seed=5)
        assert dev != split_examples(self.EXAMPLES, 0.1, seed=6)[1]

    @pytest.mark.parametrize(("count", "fraction", "num_dev"), [(2, 0.1, 1), (3, 0.9, 2), (10, 0.25, 2)])
    def test_both_parts_have_something(self, count: int, fraction: float, num_dev: int) -> None:
        train, dev = split_examples(self.EXAMPLES[:count], fraction, seed=0)
        assert (len(train), len(dev)) == (count - num_dev, num_dev)

    def test_one_source_cannot_be_split(self) -> None:
        with pytest.raises(DataError, match="at least two different sources"):
            split_examples(self.EXAMPLES[:1], 0.1, seed=0)
