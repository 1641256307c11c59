"""Opens a data file as rows: csv, tsv, JSON lines or one JSON array; as it is, gzipped, or inside a zip.

Rows come one after the other, so that looking at the first costs little. What follows `::` in a name is a part
of it: a member of a zip, or the rows of one split. Every failure is a DataError that names the file, and the
line where there is one. Knows nothing of what a row means.
"""

from __future__ import annotations

import csv
import gzip
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from antefix.data.example import kind_of
from antefix.data.readers.graph import graph_rows, is_graph
from antefix.data.readers.rows import Lines, Rows
from antefix.errors import DataError, nearest

PART = "::"
_SPLIT_WORDS = {"train": ("train",), "dev": ("dev", "valid", "val"), "test": ("test_w_refs", "testset_w_refs", "test")}
ENDINGS = (".csv", ".tsv", ".jsonl", ".json", ".conll")


def file_rows(source: str, split: str | None = None) -> Rows:
    """`(where, row)` of a data file; where is the line on which the row starts.

    split: a zip's member is chosen by it, where none is named; of any other file, the rows whose column `split`
    says so.
    """
    path, part = split_source(source)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    member = None
    if path.suffix == ".zip":
        member, split = _zip_member(path, part, split)
    elif part is not None:
        if split not in (None, part):
            raise DataError(f"{source}: two splits are asked for, '{part}' and '{split}'")
        split = part
    name = str(path) if member is None else f"{path}{PART}{Path(member).name}"
    parse = _parser(name) if member is not None or not is_graph(path) else _graph_parser(path)
    with _opened(path, member) as stream:
        rows = ((f"{name}, line {line}", row) for line, row in parse(name, _decoded(name, stream)))
        yield from rows if split is None else _of_split(rows, split, name)


def text_lines(path: Path) -> Lines:
    """`(number, line)` of a plain text file, gzipped or not."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    with _opened(path, None) as stream:
        yield from _decoded(str(path), stream)


def split_source(source: str) -> tuple[Path, str | None]:
    """The file, and the part of it that is meant."""
    path, _, part = source.partition(PART)
    return Path(path), part or None


def zip_members(path: Path) -> list[str]:
    """The data files inside a zip. Raises DataError for a broken one."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    # macOS puts a shadow of every file beside it.
    return [n for n in names if n.endswith(ENDINGS) and not n.startswith("__MACOSX/")]


def of_split(names: list[str], split: str) -> list[str]:
    """Those of some names that speak of a split, by the first of its words that any of them holds."""
    for word in _SPLIT_WORDS.get(split, (split,)):
        found = [n for n in names if word in Path(n).name.lower()]
        if found:
            return found
    return []


def _zip_member(path: Path, part: str | None, split: str | None) -> tuple[str, str | None]:
    """The member that is meant, and the split its rows are still to be chosen by."""
    members = zip_members(path)
    named = [m for m in members if part in (m, Path(m).name)]
    if len(named) == 1:
        return named[0], split
    word = part or split
    found = members if word is None else of_split(members, word)
    if len(found) != 1:
        names = ", ".join(Path(m).name for m in members) or "no data file"
        raise DataError(f"{path}: say which file inside is meant, as {path.name}{PART}NAME (it holds {names})")
    return found[0], split if part else None


@contextmanager
def _opened(path: Path, member: str | None) -> Iterator[IO[bytes]]:
    try:
        if member is not None:
            with zipfile.ZipFile(path) as archive, archive.open(member) as stream:
                yield stream
        else:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
                yield cast(IO[bytes], stream)
    # A password and an unknown compression are a RuntimeError and its subclass.
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def _decoded(name: str, stream: IO[bytes]) -> Lines:
    is_empty = True
    for number, raw in enumerate(stream, start=1):
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            byte = raw[error.start]
            raise DataError(f"{name}, line {number}: not UTF-8 (byte {byte:#04x}); save the file as UTF-8") from error
        is_empty = is_empty and not text.strip()
        yield number, text
    if is_empty:
        raise DataError(f"{name}: the file is empty")


def _parser(name: str) -> Callable[[str, Lines], Iterator[tuple[int, dict[str, Any]]]]:
    ending = Path(name.removesuffix(".gz")).suffix
    if ending in (".json", ".jsonl"):
        return json_rows
    if ending in (".csv", ".tsv"):
        return lambda name, lines: csv_rows(name, lines, "\t" if ending == ".tsv" else ",")
    if ending == ".conll":
        return conll_rows
    raise DataError(
        f"{name}: unknown kind of file; known are .csv, .tsv, .jsonl, .json, .conll (each also .gz) and .zip"
    )


def _graph_parser(path: Path) -> Callable[[str, Lines], Iterator[tuple[int, dict[str, Any]]]]:
    return lambda name, lines: graph_rows(path, lines, text_lines)


def csv_rows(name: str, lines: Lines, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """`(line, row)` of a csv with a header."""
    reader = csv.reader((text for _, text in lines), delimiter=delimiter, strict=True)
    header: list[str] = []
    line = 1
    try:
        for cells in reader:
            if not header:
                header = _header(name, line, cells)
            elif cells:
                if len(cells) != len(header):
                    raise DataError(f"{name}, line {line}: {len(cells)} cells, the header has {len(header)}")
                yield line, dict(zip(header, cells, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{name}, line {line}: broken csv ({error}); put cells with commas, quotes or line breaks in quotes, and "
            "double the quotes inside"
        ) from error


def _header(name: str, line: int, cells: list[str]) -> list[str]:
    header = [c.strip() for c in cells]
    if len(set(header)) != len(header) or not all(header):
        raise DataError(f"{name}, line {line}: the header needs distinct, non-empty column names, got {cells}")
    if len(header) == 1 and (other := next((d for d in (";", "\t", "|") if d in header[0]), None)):
        raise DataError(f"{name}, line {line}: the cells are separated by {other!r}; a .csv needs commas, a .tsv tabs")
    return header


def json_rows(name: str, lines: Lines) -> Iterator[tuple[int, dict[str, Any]]]:
    """`(line, object)` of JSON lines, or of the objects in one JSON array."""
    is_first = True
    for line, content in lines:
        if not content.strip():
            continue
        if is_first and content.lstrip().startswith("["):
            yield from _array_rows(name, line, content + "".join(text for _, text in lines))
            return
        is_first = False
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}, line {line}: not JSON ({_reason(error)})") from error
        yield line, _checked(name, line, row, content)


def _array_rows(name: str, line: int, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Object by object, for the line of each."""
    decoder = json.JSONDecoder()
    position = text.index("[")
    mark: str | None = "["
    if _after_space(text, position + 1)[1] == "]":
        return
    while mark != "]":
        start, _ = _after_space(text, position + 1)
        line += text.count("\n", position, start)
        try:
            row, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}, line {line}: not JSON ({_reason(error)})") from error
        yield line, _checked(name, line, row, text[start:end])
        position, mark = _after_space(text, end)
        line += text.count("\n", start, position)
        if mark not in (",", "]") or (mark == "]" and text[position + 1 :].strip()):
            raise DataError(f"{name}, line {line}: not JSON (the array is not ended, or goes on after its end)")


def _after_space(text: str, position: int) -> tuple[int, str | None]:
    """Where the next character that is no white space stands, and the character."""
    while position < len(text) and text[position].isspace():
        position += 1
    return position, text[position] if position < len(text) else None


def _checked(name: str, line: int, row: Any, content: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{name}, line {line}: a row must be a JSON object, this is {kind_of(row)}")
    if "\\u" in content:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{name}, line {line}: half a character ({error.object[error.start]!r} alone)") from error
    return row


def conll_rows(name: str, lines: Lines) -> Iterator[tuple[int, dict[str, Any]]]:
    """`(line, row)` of texts that an empty line ends, a word a line: the word first, its tag last."""
    words: list[str] = []
    tags: list[str] = []
    first = 1
    for line, text in lines:
        cells = text.split()
        if not cells:
            if words:
                yield first, {"words": words, "tags": tags}
            words, tags = [], []
            continue
        if len(cells) < 2:
            raise DataError(f"{name}, line {line}: a word and its tag are needed, there is only {cells[0]!r}")
        if not words:
            first = line
        words.append(cells[0])
        tags.append(cells[-1])
    if words:
        yield first, {"words": words, "tags": tags}


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return str(error)


def _of_split(rows: Rows, split: str, name: str) -> Rows:
    others = set()
    is_there = False
    for where, row in rows:
        if "split" not in row:
            raise DataError(f"{where}: no column 'split', so split '{split}' cannot be told apart: leave it out")
        if row["split"] == split:
            is_there = True
            yield where, row
        else:
            others.add(str(row["split"]))
    if others and not is_there:
        raise DataError(f"{name}: no row of split '{split}': {nearest(split, others)}")
