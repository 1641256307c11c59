"""Data files to examples. The table maps a format's name to its reader; adding one is a file and a line."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from antefix.data.example import Example, Source
from antefix.data.readers.lines import MEMBER_SEPARATOR, csv_rows, json_rows, read_text, zip_members
from antefix.errors import DataError, nearest

READERS: dict[str, str] = {
    "e2e": "antefix.data.readers.e2e",
    "triples": "antefix.data.readers.triples",
    "plain": "antefix.data.readers.plain",
    "chat": "antefix.data.readers.chat",
    "hub": "antefix.data.readers.hub",
}


def read(source: str | Path, *, format: str | None = None, **options: Any) -> list[Example]:
    """Every example of a file, `archive.zip::member.csv`, or hub data set (`hf:owner/name`).

    Rows with equal sources become one example with several targets, in the order of first appearance. format: a
    name of `READERS`; None finds it by looking. Further options are the reader's (`split`, `target_column`, ...).

    Raises DataError in one line naming file and line: a missing, empty or broken file, an unknown format, a
    missing key, an empty source or target.
    """
    source = str(source)
    format = format or detect(source, options.get("split"))
    if format not in READERS:
        raise DataError(f"unknown format '{format}': {nearest(format, READERS)}")
    rows: Callable[..., Iterator[Example]] = import_module(READERS[format]).rows
    known = set(inspect.signature(rows).parameters) - {"source"}
    for option in options:
        if option not in known:
            raise DataError(f"the reader '{format}' has no option '{option}': {nearest(option, known)}")
    examples = grouped(rows(source, **options))
    if not examples:
        raise DataError(f"{source}: the file has no rows")
    return examples


def grouped(rows: Iterable[Example]) -> list[Example]:
    """Rows with equal sources joined into one example."""
    joined: dict[Source, Example] = {}
    for row in rows:
        first = joined.get(row.source)
        if first is None:
            joined[row.source] = row
        else:
            joined[row.source] = Example(
                source=first.source, targets=first.targets + row.targets, where=first.where, labels=first.labels
            )
    return list(joined.values())


def detect(source: str, split: str | None = None) -> str:
    """The format of a file, by its first row."""
    if source.startswith("hf:"):
        return "hub"
    path = Path(source.partition(MEMBER_SEPARATOR)[0])
    if path.suffix == ".zip" and MEMBER_SEPARATOR not in source and split is None and path.is_file():
        zip_members(path)
    name, text = read_text(source, split)
    inner = name.removesuffix(".gz")
    if inner.endswith((".csv", ".tsv")):
        columns = {c.lower() for _, row in csv_rows(name, text, "\t" if inner.endswith(".tsv") else ",") for c in row}
        return "e2e" if "mr" in columns else "plain"
    if not inner.endswith((".jsonl", ".json")):
        raise DataError(f"{name}: unknown kind of file; known are .csv, .tsv, .jsonl (each also .gz) and .zip")
    row = next((row for _, row in json_rows(name, text)), {})
    if "triples" in row:
        return "triples"
    return "chat" if {"messages", "conversations", "instruction"} & set(row) else "plain"
