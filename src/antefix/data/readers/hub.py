"""A data set of the Hugging Face hub, or a local copy of one: `hf:owner/name`, `hf:owner/name:config`, `hf:folder`.

Rows take the same shapes as in plain and chat files. Needs the extra `data`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from antefix.data.example import Example
from antefix.data.readers import chat, plain
from antefix.errors import DataError

PREFIX = "hf:"


def rows(
    source: str,
    *,
    split: str | None = None,
    source_column: str | None = None,
    target_column: str | None = None,
    table_columns: Sequence[str] | None = None,
) -> Iterator[Example]:
    """One example a row; split: `train` unless said otherwise."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(f"{source}: data sets of the hub need `pip install 'antefix[data]'`") from error
    name, _, config = source.removeprefix(PREFIX).partition(":")
    try:
        data = load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # the library raises whatever its back ends raise
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{source}: the data set cannot be loaded ({first_line})") from error
    numbered: Iterator[tuple[int, dict[str, Any]]] = ((n, dict(row)) for n, row in enumerate(data, start=1))
    if {"messages", "conversations", "instruction"} & set(data.column_names):
        return chat.examples(numbered, source)
    return plain.examples(
        numbered, source, source_column=source_column, target_column=target_column, table_columns=table_columns
    )
