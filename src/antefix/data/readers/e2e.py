"""The official E2E NLG csv (Novikova et al. 2017, CC BY-SA 4.0): 42,061 training rows, 4,672 dev, 4,693 test.

    mr,ref
    "name[The Mill], eatType[pub], near[Café Sicilia]","The Mill is a pub near Café Sicilia."

The test file without references has the one column MR.
"""

from __future__ import annotations

from collections.abc import Iterator

from antefix.data.example import Example
from antefix.data.linearise import parse_table
from antefix.data.readers.lines import csv_rows, read_text, text_of
from antefix.errors import DataError


def rows(source: str, *, split: str | None = None) -> Iterator[Example]:
    """One example a row; `read` joins those with equal meaning."""
    name, text = read_text(source, split)
    for line, row in csv_rows(name, text):
        where = f"{name}, line {line}"
        lowered = {key.lower(): value for key, value in row.items()}
        meaning = text_of(lowered, "mr", where)
        table = parse_table(meaning)
        if table is None:
            raise DataError(f"{where}: '{meaning[:60]}' is no meaning like name[The Mill], food[French]")
        targets = (text_of(lowered, "ref", where),) if "ref" in lowered else ()
        yield Example(source=table, targets=targets, where=where)
