"""Plain JSON lines, csv and tsv.

    {"source": "Say hello in French.", "target": "Bonjour."}
    {"table": [["name", "Fern"], ["price", "4 €"]], "targets": ["Fern costs 4 €.", "For 4 €: Fern."]}

    name,price,text
    Fern,4 €,Fern costs 4 €.

Without `source` or `table`, the columns other than the target form a table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from antefix.data.example import Example, Source, Table
from antefix.data.readers.lines import csv_rows, json_rows, read_text, text_of
from antefix.errors import DataError, nearest

TARGET_COLUMNS = ("target", "targets", "text", "ref", "reference", "output", "summary")
_LABELS = ("split", "domain", "category", "id")


def rows(
    source: str,
    *,
    split: str | None = None,
    source_column: str | None = None,
    target_column: str | None = None,
    table_columns: Sequence[str] | None = None,
) -> Iterator[Example]:
    """One example a row.

    split: rows whose `split` column says otherwise are passed over (a zip's member is chosen by it instead).
    table_columns: the columns that form the source, in this order.
    """
    name, text = read_text(source, split)
    inner = name.removesuffix(".gz")
    if inner.endswith((".csv", ".tsv")):
        numbered: Iterator[tuple[int, dict[str, Any]]] = csv_rows(name, text, "\t" if inner.endswith(".tsv") else ",")
    else:
        numbered = json_rows(name, text)
    yield from examples(
        numbered,
        name,
        split=split,
        source_column=source_column,
        target_column=target_column,
        table_columns=table_columns,
    )


def examples(
    numbered: Iterator[tuple[int, dict[str, Any]]],
    name: str,
    *,
    split: str | None = None,
    source_column: str | None = None,
    target_column: str | None = None,
    table_columns: Sequence[str] | None = None,
) -> Iterator[Example]:
    """Examples from numbered rows, wherever they came from."""
    for line, row in numbered:
        where = f"{name}, line {line}"
        if split is not None and row.get("split", split) != split:
            continue
        target = target_column or next((c for c in TARGET_COLUMNS if c in row), None)
        if target_column is not None and target_column not in row:
            raise DataError(f"{where}: no column '{target_column}': {nearest(target_column, row)}")
        yield Example(
            source=_source(row, target, source_column, table_columns, where),
            targets=_targets(row, target, where),
            where=where,
            labels={k: str(row[k]) for k in _LABELS if k in row},
        )


def _targets(row: dict[str, Any], target: str | None, where: str) -> tuple[str, ...]:
    if target is None:
        return ()
    if not isinstance(row[target], list):
        return (text_of(row, target, where),)
    return tuple(text_of({target: t}, target, where) for t in row[target])


def _source(
    row: dict[str, Any], target: str | None, source_column: str | None, columns: Sequence[str] | None, where: str
) -> Source:
    if columns is not None:
        missing = [c for c in columns if c not in row]
        if missing:
            raise DataError(f"{where}: no column '{missing[0]}': {nearest(missing[0], row)}")
        return _as_table([(c, row[c]) for c in columns], where)
    if source_column is not None or "source" in row:
        return text_of(row, source_column or "source", where)
    if "table" in row:
        table = row["table"]
        pairs = list(table.items()) if isinstance(table, dict) else table
        if not isinstance(pairs, list) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
            raise DataError(f"{where}: 'table' must be an object or a list of [field, value] pairs")
        return _as_table(pairs, where)
    others = [(c, v) for c, v in row.items() if c != target and c not in _LABELS]
    if target is None or not others:
        raise DataError(
            f"{where}: no 'source', 'table' or target column found; name them with target_column and source_column "
            f"or table_columns (columns: {', '.join(row)})"
        )
    return _as_table(others, where)


def _as_table(pairs: Sequence[Sequence[Any]], where: str) -> Table:
    fields = tuple((str(f).strip(), str(v).strip()) for f, v in pairs if v is not None and str(v).strip())
    if not fields:
        raise DataError(f"{where}: every field of the table is empty")
    return Table(fields)
