"""What a bank's list may be asked for, and what it answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from antefix.bank.entry import Entry

MOST_TEXT = 1000
Sort = Literal["name", "changed", "size", "slots", "method"]
_SORTS: dict[Sort, str] = {
    "name": "name", "changed": "changed_ns", "size": "num_bytes", "slots": "num_virtual_tokens", "method": "method",
}  # fmt: skip
"""What a list can be sorted by, and the index's column of it."""


class Query(BaseModel):
    """Which prefixes, in which order, and which part of them. What is left as it is here does not narrow the list."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str = Field("", max_length=MOST_TEXT)
    """Words that the name, the tags or the notes of the card hold, all of them, in any case, also inside a word."""
    method: str | None = None
    tags: tuple[str, ...] = ()
    """All of them."""
    base: str | None = None
    """The base's name or its fingerprint."""
    parent: str | None = None
    """The name of a prefix that it was made from."""
    stem: str | None = None
    """The name without its version: `menus` of `menus.v3`."""
    broken: bool | None = None
    """True: those whose card cannot be read; False: the others."""
    latest: bool = False
    """Of `menus`, `menus.v1` and `menus.v2` the last alone."""
    after: str = ""
    """Only names that come after this one."""
    sort: Sort = "name"
    """`changed`: by the time when the card was written."""
    descending: bool = False
    offset: int = Field(0, ge=0)
    limit: int | None = Field(50, ge=0)
    """How many at most; None: all."""


_SPECIAL = re.compile(r"[*?\[]")
SEPARATOR = "\x1f"
"""Between tags, and between parents, in a column of the index."""


class Page(NamedTuple):
    """A part of a list."""

    entries: list[Entry]
    total: int
    """How many the whole list has."""


def listed(texts: Sequence[str]) -> str:
    """Several texts in one column, so that one of them is found in one pass over the rows."""
    return SEPARATOR + SEPARATOR.join(texts) + SEPARATOR if texts else ""


def where(query: Query) -> tuple[str, list[object]]:
    """The condition on the index's rows in SQL, and its values."""
    parts: list[str] = ["1"]
    values: list[object] = []

    def also(condition: str, *given: object) -> None:
        parts.append(condition)
        values.extend(given)

    if query.method is not None:
        also("method = ?", query.method)
    for tag in query.tags:
        also("instr(tags, ?)", listed([tag]))
    if query.base is not None:
        also("(base = ? OR fingerprint = ?)", query.base, query.base)
    if query.parent is not None:
        also("instr(parents, ?)", listed([query.parent]))
    if query.stem is not None:
        also("stem = ?", query.stem)
    if query.broken is not None:
        also("kind = ?", int(query.broken))
    if query.latest:
        also("is_latest = 1")
    if query.after:
        also("name > ?", query.after)
    for word in query.text.casefold().split():
        also("words GLOB ?", _holding(word))
    return " AND ".join(parts), values


def _holding(word: str) -> str:
    """The pattern of texts that hold a word; `GLOB` is the fastest search that SQLite has without another index."""
    return f"*{_SPECIAL.sub(lambda found: f'[{found[0]}]', word)}*"


def order(query: Query) -> str:
    """The order in SQL; ties by name, so that pages follow each other."""
    column, way = _SORTS[query.sort], "DESC" if query.descending else "ASC"
    if column == "name":
        return f"{column} {way}"
    # Sorting what a filter leaves costs less than finding every row in the order of a column: `+` takes no index.
    sign = "" if where(query) == where(Query()) else "+"
    return f"{sign}{column} {way}, {sign}name {way}"
