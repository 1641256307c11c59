"""Conversations, in the three shapes that are about.

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}      OpenAI
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}          ShareGPT
    {"instruction": "Greet.", "input": "in French", "output": "Bonjour !"}                             Alpaca

The assistant's last turn is the target, the turns before it are the source. A conversation that ends with the
user, and an instruction without `output`, have no target.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, cast

from antefix.data.example import Chat, Example, Message
from antefix.data.readers.rows import Columns, Row, Rows, list_of, text_of
from antefix.errors import DataError

_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
# Of each shape that has turns: where they are, and where a turn's role and text are.
_TURNS = {"messages": ("role", "content"), "conversations": ("from", "value")}


def examples(rows: Rows) -> Iterator[Example]:
    """One example a row."""
    for where, row in rows:
        yield _alpaca(row, where) if "instruction" in row else _conversation(row, where)


def columns(row: Row) -> Columns:
    """The columns of the row's shape."""
    if "instruction" in row:
        return Columns(("instruction", "input"), "output" if "output" in row else None)
    return Columns((_turns_column(row),), _turns_column(row))


def _alpaca(row: Row, where: str) -> Example:
    request = text_of(row, "instruction", where)
    if row.get("input") not in (None, ""):
        request += "\n\n" + text_of(row, "input", where)
    targets = (text_of(row, "output", where),) if "output" in row else ()
    return Example(source=Chat((Message("user", request),)), targets=targets, where=where)


def _conversation(row: Row, where: str) -> Example:
    key = _turns_column(row)
    role_key, text_key = _TURNS[key]
    messages = []
    for turn in list_of(row, key, where):
        role = turn.get(role_key) if isinstance(turn, dict) else None
        if not isinstance(role, str) or role not in _ROLES:
            raise DataError(f"{where}: a turn needs '{role_key}', one of {', '.join(_ROLES)}; this is {str(turn)[:60]}")
        known = cast(Literal["system", "user", "assistant"], _ROLES[role])
        messages.append(Message(known, text_of(turn, text_key, where)))
    if messages[-1].role != "assistant":
        return Example(source=Chat(tuple(messages)), where=where)
    if len(messages) == 1:
        raise DataError(f"{where}: the conversation has an answer but no question")
    return Example(source=Chat(tuple(messages[:-1])), targets=(messages[-1].content,), where=where)


def _turns_column(row: Row) -> str:
    return "conversations" if "conversations" in row and "messages" not in row else "messages"
