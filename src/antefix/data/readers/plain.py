"""Rows of any names: a text or a table, and one or more targets.

    {"source": "Say hello in French.", "target": "Bonjour."}
    {"source": "The cup fell. So", "choices": ["it broke.", "it rained."], "target": "it broke."}
    {"table": [["name", "Fern"], ["price", "4 €"]], "targets": ["Fern costs 4 €.", "For 4 €: Fern."]}

    name,price,text
    Fern,4 €,Fern costs 4 €.

The target is the first of `TARGET_COLUMNS` that the row has, the source the first of `SOURCE_COLUMNS`; where there
is no such source, all other columns form a table. Where a row has `choices`, the target is one of them, or
its number from 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from antefix.data.example import Example, Source, Table
from antefix.data.readers.rows import Columns, Row, Rows, require, text_of, texts_of
from antefix.errors import DataError

TARGET_COLUMNS = (
    "target", "targets", "ref", "reference", "references", "output", "summary", "summaries", "label", "text",
)  # fmt: skip
SOURCE_COLUMNS = ("source", "table", "input", "document", "article", "text")
CHOICES = "choices"
_NEVER_IN_A_TABLE = ("id", "idx", "split", CHOICES)


def examples(
    rows: Rows,
    *,
    source_column: str | None = None,
    target_column: str | None = None,
    table_columns: Sequence[str] | None = None,
    condition_column: str | None = None,
) -> Iterator[Example]:
    """One example a row. table_columns: the columns that form the source, in this order. condition_column: that of a
    second text, which the source may name too.

    What is neither source nor target becomes a label.
    """
    if source_column is not None and table_columns is not None:
        raise DataError("source_column and table_columns exclude each other: a source is a text or a table")
    for where, row in rows:
        for named in (source_column, target_column, condition_column, *(table_columns or ())):
            if named is not None:
                require(row, named, where)
        chosen = columns(
            row,
            source_column=source_column,
            target_column=target_column,
            table_columns=table_columns,
            condition_column=condition_column,
        )
        used = {*chosen.source, chosen.target, condition_column, CHOICES}
        choices = texts_of(row, CHOICES, where) if CHOICES in row else ()
        yield Example(
            source=_source(row, chosen, where),
            targets=_targets(row, chosen, choices, where),
            where=where,
            choices=choices,
            condition=None if condition_column is None else text_of(row, condition_column, where),
            labels={k: str(v) for k, v in row.items() if k not in used and isinstance(v, str | int | float)},
        )


def columns(
    row: Row,
    *,
    source_column: str | None = None,
    target_column: str | None = None,
    table_columns: Sequence[str] | None = None,
    condition_column: str | None = None,
) -> Columns:
    """Which columns are taken: those that are named, else those whose names are known; see above."""
    named = (source_column, condition_column, *(table_columns or ()))
    others = [c for c in row if c not in _NEVER_IN_A_TABLE and c not in named]
    target = target_column or next((c for c in TARGET_COLUMNS if c in others), None)
    others = [c for c in others if c != target]
    if table_columns is not None:
        return Columns(tuple(table_columns), target, is_table=True)
    source = source_column or next((c for c in SOURCE_COLUMNS if c in others), None)
    if source is not None:
        return Columns((source,), target)
    if not others and target is not None and target_column is None:
        return Columns((target,), None)  # a single column is a source
    return Columns(tuple(others), target, is_table=True)


def _targets(row: Row, chosen: Columns, choices: Sequence[str], where: str) -> tuple[str, ...]:
    """The texts, or the choice whose number stands there, from 0."""
    if chosen.target is None:
        return ()
    number = row[chosen.target]
    if choices and isinstance(number, int) and not isinstance(number, bool):
        if not 0 <= number < len(choices):
            raise DataError(f"{where}: '{chosen.target}' is {number}, and there are {len(choices)} choices, from 0")
        return (choices[number],)
    targets = texts_of(row, chosen.target, where)
    if choices and not set(targets) <= set(choices):
        raise DataError(f"{where}: '{chosen.target}' is none of the choices")
    return targets


def _source(row: Row, chosen: Columns, where: str) -> Source:
    content = {c: row[c] for c in chosen.source} if chosen.is_table else row[chosen.source[0]]
    if not isinstance(content, dict | list):
        return text_of(row, chosen.source[0], where)
    try:
        return Table.of(content)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
