"""WebNLG 2017 (Gardent et al., CC BY-NC-SA 4.0) and DART (Nan et al. 2021) as JSON lines.

    {"split": "train", "eid": "Id1", "category": "Food", "triples": ["Apple_pie | origin | Kent"],
     "lexs": [{"lid": "Id1", "comment": "good", "text": "Apple pie comes from Kent."}]}

DART's rows have no category, and `source` instead of `comment`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from antefix.data.example import Example, Triples
from antefix.data.readers.lines import json_rows, read_text, text_of
from antefix.errors import DataError


def rows(source: str, *, split: str | None = None, only_good: bool = False) -> Iterator[Example]:
    """One example an entry. only_good: keep the texts whose comment is "good", as the paper's code trains."""
    name, text = read_text(source, split)
    for line, row in json_rows(name, text):
        where = f"{name}, line {line}"
        triples = tuple(_triple(t, where) for t in _list(row, "triples", where))
        if not triples:
            raise DataError(f"{where}: 'triples' is empty")
        texts = [
            text_of(lex, "text", where)
            for lex in _list(row, "lexs", where)
            # A few of DART's own texts are empty: no text to learn from or to score against.
            if lex.get("text") != "" and (not only_good or lex.get("comment", "good") == "good")
        ]
        labels = {k: str(row[k]) for k in ("split", "eid", "category", "seen") if k in row}
        yield Example(source=Triples(triples), targets=tuple(texts), where=where, labels=labels)


def _list(row: dict[str, Any], key: str, where: str) -> list[Any]:
    value = row.get(key)
    if not isinstance(value, list):
        raise DataError(f"{where}: '{key}' must be a list")
    return value


def _triple(triple: Any, where: str) -> tuple[str, str, str]:
    parts = triple.split(" | ") if isinstance(triple, str) else triple
    if not isinstance(parts, list) or len(parts) != 3 or not all(isinstance(p, str) for p in parts):
        raise DataError(f"{where}: {str(triple)[:60]!r} is no triple 'subject | relation | object'")
    return parts[0], parts[1], parts[2]
