"""Opens a data file as text or as numbered rows: plain, gzip, or a member of a zip (`archive.zip::member.csv`).

Every failure is a DataError that names the file, and the line where there is one.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from antefix.errors import DataError, nearest

MEMBER_SEPARATOR = "::"
_SPLIT_WORDS = {"train": ("train",), "dev": ("dev", "valid"), "test": ("test_w_refs", "testset_w_refs", "test")}


def read_text(source: str, split: str | None = None) -> tuple[str, str]:
    """The name to use in messages, and the whole text."""
    path_text, _, member = source.partition(MEMBER_SEPARATOR)
    path = Path(path_text)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        if path.suffix == ".zip":
            name, raw = _zip_member(path, member or None, split)
        else:
            name, raw = str(path), gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    if not raw.strip():
        raise DataError(f"{name}: the file is empty")
    try:
        return name, raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{name}, line {line}: not UTF-8 (byte {raw[error.start]:#04x}); save the file as UTF-8"
        ) from error


def zip_members(path: Path) -> list[str]:
    """The data files inside a zip."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [m for m in archive.namelist() if m.endswith((".csv", ".tsv", ".jsonl", ".json"))]
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def _zip_member(path: Path, member: str | None, split: str | None) -> tuple[str, bytes]:
    members = zip_members(path)
    wanted = [m for m in members if member is not None and (m == member or Path(m).name == member)]
    if member is None and split is not None:
        words = _SPLIT_WORDS.get(split, (split,))
        wanted = next((found for w in words if (found := [m for m in members if w in Path(m).name])), [])
    if member is None and split is None and len(members) == 1:
        wanted = members
    if len(wanted) != 1:
        names = ", ".join(Path(m).name for m in members)
        raise DataError(f"{path}: say which file inside is meant, as {path.name}::NAME (it holds {names})")
    with zipfile.ZipFile(path) as archive:
        return f"{path}::{Path(wanted[0]).name}", archive.read(wanted[0])


def csv_rows(name: str, text: str, delimiter: str = ",") -> Iterator[tuple[int, dict[str, str]]]:
    """`(line, row)` of a csv with a header; the line is where the row starts in the file."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    line = 1
    try:
        for cells in reader:
            if not header:
                header = [h.strip() for h in cells]
                if len(set(header)) != len(header) or not all(header):
                    raise DataError(f"{name}, line 1: the header needs distinct, non-empty column names, got {cells}")
            elif cells:
                if len(cells) != len(header):
                    raise DataError(f"{name}, line {line}: {len(cells)} cells, the header has {len(header)}")
                yield line, dict(zip(header, cells, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{name}, line {line}: broken csv ({error}); quote cells that hold commas or quotes") from error


def json_rows(name: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """`(line, object)` of a JSON-lines file."""
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}, line {line}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{name}, line {line}: a row must be a JSON object, this is {type(row).__name__}")
        yield line, row


def text_of(row: dict[str, Any], key: str, where: str) -> str:
    """A non-empty text under a key. Raises DataError naming the nearest key there is."""
    if key not in row:
        raise DataError(f"{where}: no '{key}': {nearest(key, row)}")
    value = row[key]
    if not isinstance(value, str):
        raise DataError(f"{where}: '{key}' must be a text, this is {type(value).__name__}")
    if not value.strip():
        raise DataError(f"{where}: '{key}' is empty")
    return value.strip()
