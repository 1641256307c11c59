"""Conversations as JSON lines, in the three shapes that are about.

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}      OpenAI
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}          ShareGPT
    {"instruction": "Greet.", "input": "in French", "output": "Bonjour !"}                             Alpaca

The last turn of the assistant is the target, the turns before it are the source.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, cast

from antefix.data.example import Chat, Example, Message
from antefix.data.readers.lines import json_rows, read_text, text_of
from antefix.errors import DataError

_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


def rows(source: str, *, split: str | None = None) -> Iterator[Example]:
    """One example a row."""
    name, text = read_text(source, split)
    return examples(json_rows(name, text), name)


def examples(numbered: Iterator[tuple[int, dict[str, Any]]], name: str) -> Iterator[Example]:
    """Examples from numbered rows, wherever they came from."""
    for line, row in numbered:
        where = f"{name}, line {line}"
        if "instruction" in row:
            yield _alpaca(row, where)
        else:
            yield _turns(row, where)


def _alpaca(row: dict[str, Any], where: str) -> Example:
    request = text_of(row, "instruction", where)
    if str(row.get("input") or "").strip():
        request += "\n\n" + text_of(row, "input", where)
    return Example(source=Chat((Message("user", request),)), targets=(text_of(row, "output", where),), where=where)


def _turns(row: dict[str, Any], where: str) -> Example:
    key, role_key, text_key = (
        ("messages", "role", "content") if "messages" in row else ("conversations", "from", "value")
    )
    turns = row.get(key)
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: no conversation; a row needs 'messages', 'conversations' or 'instruction'")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict) or turn.get(role_key) not in _ROLES:
            raise DataError(f"{where}: a turn needs '{role_key}', one of {', '.join(_ROLES)}; this is {str(turn)[:60]}")
        role = cast(Literal["system", "user", "assistant"], _ROLES[turn[role_key]])
        messages.append(Message(role, text_of(turn, text_key, where)))
    if messages[-1].role != "assistant":
        return Example(source=Chat(tuple(messages)), where=where)
    if len(messages) == 1:
        raise DataError(f"{where}: the conversation has an answer but no question")
    return Example(source=Chat(tuple(messages[:-1])), targets=(messages[-1].content,), where=where)
