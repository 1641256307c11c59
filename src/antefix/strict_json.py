"""JSON from a stranger, read so that no two readers can read it in two ways. Knows nothing of what it says."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

MOST_DEPTH = 32


def parse(raw: bytes) -> dict[str, Any]:
    """The JSON object in these bytes.

    Raises ValueError, in one line, for anything else, a key that occurs twice, NaN and infinity, half a surrogate
    pair, and nesting deeper than `MOST_DEPTH`. The caller limits the size.
    """
    try:
        content = json.loads(raw.decode(), object_pairs_hook=_distinct, parse_constant=_no_constant)
        too_deep = _depth(content) > MOST_DEPTH
    except RecursionError:
        too_deep = True
    if too_deep:
        raise ValueError(f"nested more than {MOST_DEPTH} deep")
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    json.dumps(content, ensure_ascii=False).encode()  # half a surrogate pair is no text
    return content


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key occurs twice")
    return content


def _no_constant(word: str) -> float:
    raise ValueError(f"{word} is no JSON")


def _depth(value: Any) -> int:
    inner: Iterable[Any] = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0)
