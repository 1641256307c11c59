"""Rows of a Hugging Face data set: `hf:owner/name`, `hf:owner/name:config`, or a local folder as `hf:folder`.

The split follows `::`, as in `hf:owner/name::validation`; it is `train` unless said otherwise. Needs the extra
`data`. Knows nothing of what a row means.
"""

from __future__ import annotations

from typing import Any

from antefix.data.readers.lines import PART
from antefix.data.readers.rows import Rows
from antefix.errors import DataError

PREFIX = "hf:"


def hub_rows(source: str, split: str | None = None) -> Rows:
    """`(where, row)` of one split. Raises DataError, in one line, where the data set cannot be loaded."""
    whole, _, part = source.partition(PART)
    if part and split not in (None, part):
        raise DataError(f"{source}: two splits are asked for, '{part}' and '{split}'")
    data = _load("load_dataset", whole, split=split or part or "train")
    for number, row in enumerate(data, start=1):
        yield f"{source}, row {number}", dict(row)


def hub_splits(source: str) -> list[str]:
    """The names of a data set's splits. Raises DataError as `hub_rows` does."""
    return list(_load("get_dataset_split_names", source.partition(PART)[0]))


def _load(function: str, source: str, **options: Any) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{source}: data sets of the hub need `pip install 'antefix[data]'`") from error
    name, _, config = source.removeprefix(PREFIX).partition(":")
    if not name:
        raise DataError(f"{source}: name a data set, as hf:owner/name or hf:folder")
    try:
        return getattr(datasets, function)(name, config or None, **options)
    except Exception as error:  # the library raises whatever its back ends raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{source}: the data set cannot be loaded ({reason})") from error
