"""What is in a data file: its format, its columns, its sizes, and where its dev set is.

Looks, and changes nothing. Knows nothing of models; how many tokens a text has, a tokenizer's file can tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from antefix.data.example import Chat, Example, Source, Table
from antefix.data.linearise import TextFormat, default_format
from antefix.data.readers import format_of, read, reader, rows_of
from antefix.data.readers.hub import PREFIX, hub_splits
from antefix.data.readers.lines import PART, of_split, zip_members
from antefix.data.readers.rows import Row
from antefix.errors import DataError

_MOST_CLASSES, _LONGEST_CLASS_CHARS = 8, 30
_SIBLINGS = ("dev", "valid", "validation", "val")


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long texts are: the median and the longest of all, or of a sample (see `Look.source_lengths`)."""

    median: int
    longest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What was found."""

    train: str
    """The training part, as `read` takes it."""
    dev: str | None
    """The dev part, where there is one."""
    format: str
    options: dict[str, Any]
    """The reader's options that were given."""
    source_columns: tuple[str, ...]
    target_column: str
    examples: Sequence[Example]
    text_format: TextFormat

    @property
    def num_pairs(self) -> int:
        """Source/target pairs."""
        return sum(len(e.targets) for e in self.examples)

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of the tables, in order of appearance; empty for sources of another kind."""
        tables = [e.source for e in self.examples if isinstance(e.source, Table)]
        return tuple(dict.fromkeys(field for table in tables for field, _ in table.fields))

    @property
    def classes(self) -> tuple[str, ...]:
        """The targets, where they are a few short ones that come again and again; else empty."""
        found = dict.fromkeys(t for e in self.examples for t in e.targets)
        few = 2 <= len(found) <= min(_MOST_CLASSES, self.num_pairs // 2)
        return tuple(found) if few and all(len(t) <= _LONGEST_CLASS_CHARS for t in found) else ()

    def source_lengths(self, count: Callable[[str], int] = len) -> Lengths:
        """How long the sources are, as the model reads them: in characters, or in what `count` counts.

        Of more than two thousand a sample is counted, the longest by characters in it: `longest` is exact in
        characters, while in tokens another source may have a few more.
        """
        return _lengths([self.written(e.source) for e in self.examples], count)

    def target_lengths(self, count: Callable[[str], int] = len) -> Lengths:
        """The same for targets."""
        return _lengths([t for e in self.examples for t in e.targets], count)

    def written(self, source: Source) -> str:
        """A source as text; a conversation without its template."""
        if isinstance(source, Chat):
            return "\n".join(m.content for m in source.messages)
        return self.text_format.source_text(source)


def look(source: str, *, format: str | None = None, **options: Any) -> Look:
    """Look at a data file, or at a data set `hf:owner/name`.

    Of a zip, a file with a column `split`, or a data set, the part for training is taken unless one is named.
    Raises DataError as `read` does, and where the rows have no target.
    """
    whole, _, part = source.partition(PART)
    parts = _parts(whole)
    if len(parts) < 2:
        parts = []  # one part is the whole
    train = part or _only(of_split(parts, "train"))
    dev = _only([name for name in of_split(parts, "dev") if name != train])
    source = f"{whole}{PART}{train}" if train else whole
    row = _first_row(source)
    format = format or format_of(row)
    columns = reader(format, options).columns(row, **options)
    examples = read(source, format=format, **options)
    if columns.target is None or not examples[0].targets:
        named = "name it (`antefix init` with --target-column NAME, a recipe with data.reader.target_column)"
        todo = named if format == "plain" else f"rows of the format '{format}' need one"
        raise DataError(f"{source}: no target among the columns {', '.join(row)}: {todo}")
    return Look(
        train=source,
        dev=f"{whole}{PART}{dev}" if train and dev else _sibling(source),
        format=format,
        options=options,
        source_columns=columns.source,
        target_column=columns.target,
        examples=examples,
        text_format=default_format([e.source for e in examples]),
    )


def _parts(whole: str) -> list[str]:
    """The names that may follow `::`."""
    if whole.startswith(PREFIX):
        return hub_splits(whole)
    path = Path(whole)
    if path.suffix == ".zip" and path.is_file():
        return [Path(member).name for member in zip_members(path)]
    if "split" not in _first_row(whole):
        return []
    return list(dict.fromkeys(str(row.get("split")) for _, row in rows_of(whole)))


def _first_row(source: str) -> Row:
    first = next(rows_of(source), None)
    if first is None:
        raise DataError(f"{source}: the file has no rows")
    return first[1]


def _only(names: Sequence[str]) -> str | None:
    return names[0] if len(names) == 1 else None


def _sibling(source: str) -> str | None:
    """`dev.csv` beside `train.csv`, and the like."""
    path = Path(source)
    if PART in source or source.startswith(PREFIX) or "train" not in path.name:
        return None
    beside = [path.with_name(path.name.replace("train", word)) for word in _SIBLINGS]
    return next((str(p) for p in beside if p.is_file()), None)


def _lengths(texts: list[str], count: Callable[[str], int]) -> Lengths:
    """Of many texts, two thousand are counted, the longest among them."""
    ordered = sorted(texts, key=len, reverse=True)
    lengths = [count(text) for text in ordered[:: max(1, len(ordered) // 2000)]]
    return Lengths(int(median(lengths)), max(lengths))
