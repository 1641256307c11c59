"""Data files to examples.

Where rows come from (`lines`: files, `hub`: data sets) and what a row means (the table of readers) are two
questions. A reader is a module with two functions: `examples(rows, **options)` and `columns(row, **options)`;
adding one is a file, a line in the table and a line in `format_of`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from importlib import import_module
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

from antefix.data.example import Example, Source
from antefix.data.readers.hub import PREFIX, hub_rows
from antefix.data.readers.lines import file_rows
from antefix.data.readers.rows import Row, Rows
from antefix.errors import DataError, nearest

READERS: dict[str, str] = {
    "e2e": "antefix.data.readers.e2e",
    "triples": "antefix.data.readers.triples",
    "plain": "antefix.data.readers.plain",
    "chat": "antefix.data.readers.chat",
    "tagged": "antefix.data.readers.tagged",
}


def read(source: str | Path, *, format: str | None = None, split: str | None = None, **options: Any) -> list[Example]:
    """Every example of a file, of `archive.zip::member.csv`, or of a data set `hf:owner/name`.

    Rows with equal sources become one example with several targets, in the order of first appearance. format: a
    name of `READERS`; None finds it by the first row. split: the member of a zip, the rows whose column `split`
    says so, or the data set's split; `FILE::SPLIT` says the same. Further options are the reader's
    (`target_column`, ...).

    Raises DataError in one line naming file and line: a missing, empty or broken file, an unknown format, a
    missing key, an empty source or target.
    """
    return joined(read_rows(source, format=format, split=split, **options))


def read_rows(
    source: str | Path, *, format: str | None = None, split: str | None = None, **options: Any
) -> list[Example]:
    """The same with an example a row: nothing is joined."""
    rows = rows_of(str(source), split)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{source}: the file has no rows")
    module = reader(format or format_of(first[1]), options)
    examples = list(_alike(module.examples(chain([first], rows), **options)))
    if not examples:
        raise DataError(f"{source}: no row is left by {options}")
    return examples


def rows_of(source: str, split: str | None = None) -> Rows:
    """`(where, row)` of a file or a data set."""
    return hub_rows(source, split) if source.startswith(PREFIX) else file_rows(source, split)


def format_of(row: Row) -> str:
    """The reader for rows like this one, told by its columns."""
    if "mr" in {column.lower() for column in row}:
        return "e2e"
    if "triples" in row:
        return "triples"
    if isinstance(row.get("words"), list):
        return "tagged"
    return "chat" if {"messages", "conversations", "instruction"} & set(row) else "plain"


def reader(format: str, options: Iterable[str] = ()) -> ModuleType:
    """A reader's module. Raises DataError for an unknown name or option, with the nearest known one."""
    if format not in READERS:
        raise DataError(f"unknown format '{format}': {nearest(format, READERS)}")
    module = import_module(READERS[format])
    known = [name for name in inspect.signature(module.examples).parameters if name != "rows"]
    for option in options:
        if option not in known:
            raise DataError(f"the reader '{format}' has no option '{option}': {nearest(option, ['split', *known])}")
    return module


def _alike(rows: Iterator[Example]) -> Iterator[Example]:
    """Refuses data in which some rows are of another kind than the first: a mistake that would train in silence."""
    first: Example | None = None
    for row in rows:
        first = first or row
        if bool(row.targets) != bool(first.targets):
            have = ("a target", "none") if row.targets else ("no target", "one")
            raise DataError(f"{row.where}: this row has {have[0]}, {first.where} has {have[1]}")
        if type(row.source) is not type(first.source):
            raise DataError(f"{row.where}: this row's source is of another kind than that of {first.where}")
        yield row


def joined(rows: Iterable[Example], apart: Callable[[Example], Any] = lambda row: None) -> list[Example]:
    """Rows with equal sources (and second texts) as one example. apart: rows that differ in this stay apart."""
    firsts: dict[tuple[Source, str | None, Any], Example] = {}
    targets: dict[tuple[Source, str | None, Any], list[str]] = {}
    for row in rows:
        key = row.source, row.condition, apart(row)
        firsts.setdefault(key, row)
        targets.setdefault(key, []).extend(row.targets)
    return [replace(first, targets=tuple(targets[key])) for key, first in firsts.items()]
