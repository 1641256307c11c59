"""Words with a tag each, as CoNLL files have them, or as JSON lines.

    {"words": ["Fern", "lives", "in", "Kent"], "tags": ["B-person", "O", "O", "B-location"]}

    Fern    B-person
    lives   O

Without `tags` the rows have no target.
"""

from __future__ import annotations

from collections.abc import Iterator

from antefix.data.example import Example, Words
from antefix.data.readers.rows import Columns, Row, Rows, list_of
from antefix.errors import DataError


def examples(rows: Rows) -> Iterator[Example]:
    """One example a text; its target is the tags, separated by spaces."""
    for where, row in rows:
        words = _texts(row, "words", where)
        tags = _texts(row, "tags", where) if "tags" in row else None
        if tags is not None and len(tags) != len(words):
            raise DataError(f"{where}: {len(words)} words and {len(tags)} tags")
        yield Example(source=Words(words), targets=() if tags is None else (" ".join(tags),), where=where)


def columns(row: Row) -> Columns:
    """The two columns."""
    return Columns(("words",), "tags" if "tags" in row else None)


def _texts(row: Row, key: str, where: str) -> tuple[str, ...]:
    texts = list_of(row, key, where)
    if not all(isinstance(text, str) and text and not any(c.isspace() for c in text) for text in texts):
        raise DataError(f"{where}: every entry of '{key}' must be a text without spaces")
    return tuple(texts)
