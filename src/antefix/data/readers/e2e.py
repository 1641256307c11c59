"""The official E2E NLG csv (Novikova et al. 2017, CC BY-SA 4.0): 42,061 training rows, 4,672 dev, 4,693 test.

    mr,ref
    "name[Mill Inn], eatType[pub], near[Fern Hill]","Mill Inn is a pub near Fern Hill."

The test file without references has the one column MR.
"""

from __future__ import annotations

from collections.abc import Iterator

from antefix.data.example import Example, Table
from antefix.data.linearise import parse_table
from antefix.data.readers.rows import Columns, Row, Rows, text_of
from antefix.errors import DataError


def examples(rows: Rows) -> Iterator[Example]:
    """One example a row; `read` joins those with equal meaning."""
    tables: dict[str, Table | None] = {}  # a meaning has 8.6 texts: it is parsed once
    for where, row in rows:
        lowered = {column.lower(): value for column, value in row.items()}
        meaning = text_of(lowered, "mr", where)
        if meaning not in tables:
            tables[meaning] = parse_table(meaning)
        table = tables[meaning]
        if table is None:
            raise DataError(f"{where}: '{meaning[:60]}' is no meaning like name[Mill Inn], food[French]")
        targets = (text_of(lowered, "ref", where),) if "ref" in lowered else ()
        yield Example(source=table, targets=targets, where=where)


def columns(row: Row) -> Columns:
    """The two columns, as this file writes them."""
    spelt = {column.lower(): column for column in row}
    return Columns((spelt["mr"],), spelt.get("ref"))
