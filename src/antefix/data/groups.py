"""Examples in groups that share no row: those of every customer, domain or style.

A group is told by columns of the rows, or by attributes of their tables. Rows are put into groups before rows with
equal sources are joined, so that no group learns what another one wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from antefix.data.example import Example, Table
from antefix.data.readers import joined, read_rows
from antefix.errors import DataError, nearest

Values = tuple[str, ...]
"""What tells a group: a value of every column."""


@dataclass(frozen=True, slots=True)
class Groups:
    """The groups of a data set, in the order of first appearance."""

    by: tuple[str, ...]
    examples: dict[Values, list[Example]]
    without_value: dict[str, int]
    """Rows that are in no group, by the first column in which they have nothing."""


def read_groups(
    source: str, by: Sequence[str], *, keep_empty: bool = False, format: str | None = None, **options: Any
) -> Groups:
    """Read a data set in groups; see `antefix.data.read` for the arguments.

    by: columns that are neither source nor target, or attributes of the tables. keep_empty: nothing is a value like any
    other, where another column has one; else rows without a value are left out. Raises DataError for a name that no row
    has, and for one in which all rows are empty.
    """
    rows = read_rows(source, format=format, **options)
    _check_columns(source, rows, by)
    groups: dict[Values, list[Example]] = {}
    without: dict[str, int] = {}
    for row in rows:
        values = [value_of(row, column) for column in by]
        missing = [column for column, value in zip(by, values, strict=True) if value is None]
        if missing and not (keep_empty and any(values)):
            without[missing[0]] = without.get(missing[0], 0) + 1
        else:
            groups.setdefault(tuple(value or "" for value in values), []).append(row)
    if not groups:
        raise DataError(f"{source}: no row has a value in each of {', '.join(by)}")
    return Groups(tuple(by), {values: joined(some) for values, some in groups.items()}, without)


def read_named(source: str, column: str, **options: Any) -> tuple[list[Example], list[str | None]]:
    """Examples, and what a column says of each; None: nothing. The column is no part of a source.

    Rows with equal sources are joined where the column says the same. Raises DataError for a column that no row has.
    """
    rows = read_rows(source, **options)
    known = {name for row in rows for name in _said(row)}
    if column not in known:
        raise DataError(
            f"{source}: no row has a column '{column}': {nearest(column, known) if known else 'it has none'}"
        )
    named = [_without(row, column) for row in rows]
    examples = joined(named, lambda row: value_of(row, column))
    return examples, [value_of(example, column) for example in examples]


def _without(row: Example, column: str) -> Example:
    """The column among the labels, and not in the table."""
    if not isinstance(row.source, Table) or all(field != column for field, _ in row.source.fields):
        return row
    rest = Table(tuple(pair for pair in row.source.fields if pair[0] != column))
    if not rest.fields:
        raise DataError(f"{row.where}: the row has nothing beside its '{column}'")
    return replace(row, source=rest, labels={**row.labels, column: _said(row)[column]})


def value_of(example: Example, column: str) -> str | None:
    """What an example says under this name; None: nothing, or white space."""
    return (_said(example).get(column) or "").strip() or None


def _said(example: Example) -> dict[str, str]:
    """Columns and attributes; of an attribute that comes several times, the first."""
    fields = example.source.fields if isinstance(example.source, Table) else ()
    return {**dict(reversed(fields)), **example.labels}


def _check_columns(source: str, rows: Sequence[Example], by: Sequence[str]) -> None:
    known = {name for row in rows for name in _said(row)}
    for column in by:
        if column not in known:
            there = nearest(column, known) if known else "its rows have only a source and a target"
            raise DataError(f"{source}: no row has a column or attribute '{column}' beside its text: {there}")
        if all(value_of(row, column) is None for row in rows):
            raise DataError(f"{source}: '{column}' is empty in every row")
