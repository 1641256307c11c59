"""What a reader asks of a row: texts and lists by name, checked; and which columns it takes.

A row is a dict with the place it came from (``menus.csv, line 3``), which opens every message.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from antefix.data.example import kind_of
from antefix.errors import DataError, nearest

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row]]
"""`(where, row)`, one after the other."""
Lines = Iterator[tuple[int, str]]
"""`(number, text)` of a file, from line 1 on, with its line end."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns of a row a reader makes an example of."""

    source: tuple[str, ...]
    target: str | None
    """None: the rows have no target."""
    is_table: bool = False
    """Whether the source's columns are the fields of a table."""


def text_of(row: Row, key: str, where: str) -> str:
    """The text under a key, without the white space around it.

    Raises DataError for a missing key (naming the nearest there is), for what is no text, and for an empty one.
    """
    require(row, key, where)
    value = row[key]
    if not isinstance(value, str):
        quotes = ": put it in quotes" if isinstance(value, int | float) else ""
        raise DataError(f"{where}: '{key}' must be a text, this is {kind_of(value)}{quotes}")
    value = value.strip()
    if not value:
        raise DataError(f"{where}: '{key}' is empty")
    return value


def texts_of(row: Row, key: str, where: str) -> tuple[str, ...]:
    """One text, or a list of at least one, under a key. Raises DataError as `text_of` does."""
    if not isinstance(row.get(key), list):
        return (text_of(row, key, where),)
    if not row[key]:
        raise DataError(f"{where}: '{key}' is an empty list")
    return tuple(text_of({key: text}, key, where) for text in row[key])


def list_of(row: Row, key: str, where: str) -> list[Any]:
    """The list under a key. Raises DataError for a missing key and for what is no list or an empty one."""
    require(row, key, where)
    value = row[key]
    if not isinstance(value, list):
        raise DataError(f"{where}: '{key}' must be a list, this is {kind_of(value)}")
    if not value:
        raise DataError(f"{where}: '{key}' is an empty list")
    return value


def require(row: Row, key: str, where: str) -> None:
    """Raises DataError, with the nearest name there is, if a row lacks a key."""
    if key not in row:
        raise DataError(f"{where}: no '{key}': {nearest(key, row)}")
