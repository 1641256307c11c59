"""WebNLG 2017 (Gardent et al., CC BY-NC-SA 4.0) and DART (Nan et al. 2021) as JSON lines.

    {"split": "train", "eid": "Id1", "category": "Food", "triples": ["Apple_pie | origin | Kent"],
     "lexs": [{"lid": "Id1", "comment": "good", "text": "Apple pie comes from Kent."}]}

DART's rows have no category, and `source` instead of `comment`. A row without `lexs` has no target, unless it has a
`label` that says whether its triple is true (see `antefix.tasks.triples`):

    {"triples": ["Apple pie | comes from | Kent"], "label": "true"}
"""

from __future__ import annotations

from collections.abc import Iterator

from antefix.data.example import Example, Triples
from antefix.data.readers.rows import Columns, Row, Rows, list_of, require, text_of
from antefix.errors import DataError

_LABELS = ("split", "eid", "category", "seen")


def examples(rows: Rows, *, only_good: bool = False) -> Iterator[Example]:
    """One example an entry. only_good: texts whose comment says otherwise are left out, as the paper's code trains;
    an entry that has no other is left out too.
    """
    for where, row in rows:
        require(row, "triples", where)
        try:
            triples = Triples.of(row["triples"])
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        texts = _texts(row, where, only_good) if "lexs" in row else ()
        if "label" in row:
            texts = (text_of(row, "label", where),)
        if texts or "lexs" not in row:
            labels = {k: str(row[k]) for k in _LABELS if k in row}
            yield Example(source=triples, targets=texts, where=where, labels=labels)


def columns(row: Row, *, only_good: bool = False) -> Columns:
    """The two columns."""
    return Columns(("triples",), next((name for name in ("label", "lexs") if name in row), None))


def _texts(row: Row, where: str, only_good: bool) -> tuple[str, ...]:
    entries = list_of(row, "lexs", where)
    if not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{where}: every entry of 'lexs' must be an object with a 'text'")
    if len(entries) > 1:
        # DART has an empty text beside good ones: nothing to learn from or to score against.
        entries = [entry for entry in entries if entry.get("text") != ""] or entries
    return tuple(text_of(e, "text", where) for e in entries if not only_good or e.get("comment", "good") == "good")
