"""Files of texts to be scored, and of the references they are scored against.

Hypotheses: one text a line, in the order of the inputs; or JSON lines with a `text` (what `antefix generate` writes),
ordered by `index` where they have it.

References, one of
- a text file: the texts of one input on consecutive lines, a blank line between inputs; a file without any blank
  line has one text an input (the format of the E2E challenge's scorer);
- JSON lines with nothing but `references`, `targets` or `target` (a text or a list of texts), one input a line;
- any data file that `antefix.data.read` takes: an example is an input, its targets are the references. Rows with an
  equal source are one input.

Any of them may be gzipped. Knows nothing of scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from antefix.data.example import Source, Table, kind_of
from antefix.data.readers import read, rows_of
from antefix.data.readers.hub import PREFIX
from antefix.data.readers.lines import ENDINGS, PART, text_lines
from antefix.data.readers.rows import Row, require, texts_of
from antefix.errors import DataError, MetricError

_REFERENCE_COLUMNS = ("references", "targets", "target")
_BESIDE = frozenset({"index", "where", "id", "idx", "split"})
"""Columns that may stand beside bare references: they are no source."""
_INDEX = "index"


@dataclass(frozen=True, slots=True, kw_only=True)
class References:
    """What the hypotheses of one set are scored against."""

    name: str
    """The file, as messages name it."""
    groups: list[list[str]]
    """For every input one or more texts."""
    sources: list[Source] | None
    """The inputs themselves; None where the file has the texts alone."""

    def tables(self) -> list[Table]:
        """The inputs as tables. Raises MetricError if they are something else, or not there."""
        tables = [source for source in self.sources or () if isinstance(source, Table)]
        if len(tables) < len(self.groups):
            raise MetricError(
                f"{self.name}: table values can only be checked against tables, and these references come without: "
                "give a data file whose sources are tables"
            )
        return tables


def read_references(source: str, split: str | None = None, reader: Mapping[str, Any] | None = None) -> References:
    """References from a file in one of the formats above. split, reader: as for `antefix.data.read`.

    Raises DataError in one line naming file and line.
    """
    if not _is_data(source):
        if split is not None:
            raise DataError(f"{source}: a text file has no split '{split}': leave it out")
        if reader:
            raise DataError(f"{source}: a text file has no columns: leave --reader out")
        return References(name=source, groups=_blocks(source), sources=None)
    rows = rows_of(source, split)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{source}: the file has no rows")
    column = None if reader else _bare_column(first[1])
    if column is not None:
        ordered = _in_order(chain([first], rows))
        groups = [list(texts_of(row, column, where)) for where, row in ordered]
        return References(name=source, groups=groups, sources=None)
    examples = read(source, split=split, **(reader or {}))
    if not examples[0].targets:
        raise DataError(
            f"{examples[0].where}: no reference among the columns {', '.join(first[1])}: name it, "
            "--reader target_column=NAME"
        )
    return References(name=source, groups=[list(e.targets) for e in examples], sources=[e.source for e in examples])


def read_hypotheses(source: str, references: References) -> list[str]:
    """One text for every input, in the order of the references.

    Raises DataError naming file and line, and MetricError if there are more or fewer texts than inputs.
    """
    if not _is_data(source):
        texts = [text.strip() for _, text in text_lines(Path(source))]
    elif Path(source.removesuffix(".gz")).suffix in (".jsonl", ".json"):
        texts = [_hypothesis(row, where) for where, row in _in_order(rows_of(source))]
    else:
        raise DataError(f"{source}: texts to be scored come one a line, or as JSON lines with a 'text'")
    if len(texts) != len(references.groups):
        joined = "" if references.sources is None else ", where rows with an equal source are one input"
        raise MetricError(
            f"{source} has {len(texts)} texts, {references.name} has references for {len(references.groups)} inputs"
            f"{joined}: one text for every input is needed"
        )
    return texts


def _is_data(source: str) -> bool:
    ending = Path(source.removesuffix(".gz")).suffix
    return source.startswith(PREFIX) or PART in source or ending in (*ENDINGS, ".zip")


def _blocks(source: str) -> list[list[str]]:
    lines = [(number, text.strip()) for number, text in text_lines(Path(source))]
    if all(text for _, text in lines):
        return [[text] for _, text in lines]
    while not lines[-1][1]:
        lines.pop()
    groups: list[list[str]] = [[]]
    for number, text in lines:
        if text:
            groups[-1].append(text)
        elif groups[-1]:
            groups.append([])
        else:
            raise DataError(f"{source}, line {number}: an input without a reference: leave one blank line between two")
    return groups


def _bare_column(row: Row) -> str | None:
    """The column of a row that holds references and has no source beside it."""
    columns = [column for column in row if column not in _BESIDE]
    return columns[0] if len(columns) == 1 and columns[0] in _REFERENCE_COLUMNS else None


def _in_order(rows: Iterable[tuple[str, Row]]) -> list[tuple[str, Row]]:
    """By index where the rows have one, else as they come."""
    listed = list(rows)
    if not any(_INDEX in row for _, row in listed):
        return listed
    numbered: dict[int, tuple[str, Row]] = {}
    for where, row in listed:
        require(row, _INDEX, where)
        index = row[_INDEX]
        if type(index) is not int:
            raise DataError(f"{where}: '{_INDEX}' must be a whole number, this is {str(index)[:20]!r}")
        if index in numbered:
            raise DataError(f"{where}: index {index} occurs twice, first in {numbered[index][0]}")
        numbered[index] = (where, row)
    return [numbered[index] for index in sorted(numbered)]


def _hypothesis(row: Row, where: str) -> str:
    """An empty text is a text: a model may write nothing."""
    require(row, "text", where)
    if not isinstance(row["text"], str):
        raise DataError(f"{where}: 'text' must be a text, this is {kind_of(row['text'])}")
    return row["text"]
