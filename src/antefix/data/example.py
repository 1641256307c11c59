"""One example: a source, its targets, and where it came from. Knows nothing of files, tokens or models."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from antefix.errors import DataError


@dataclass(frozen=True, slots=True)
class Table:
    """Ordered fields with their values; a field may occur twice."""

    fields: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, content: Any) -> Table:
        """From an object, or a list of `[field, value]` pairs. Fields without a value are left out.

        Raises DataError for any other shape, a value that is neither text nor number, and a table of no values.
        """
        pairs = list(content.items()) if isinstance(content, dict) else content
        if not isinstance(pairs, list) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
            raise DataError("a table must be an object or a list of [field, value] pairs")
        if not all(isinstance(field, str) and field.strip() for field, _ in pairs):
            raise DataError("every field of a table needs a name")
        fields = tuple((f.strip(), v) for f, value in pairs if (v := _written(f, value)))
        if not fields:
            raise DataError("every field of the table is empty")
        return cls(fields)


def _written(field: Any, value: Any) -> str:
    if value is None or isinstance(value, str):
        return (value or "").strip()
    if not isinstance(value, bool | int | float):
        raise DataError(f"the value of '{field}' must be a text or a number, this is {kind_of(value)}")
    return json.dumps(value)


def kind_of(value: Any) -> str:
    """What a value of a JSON file is, in a message's words."""
    names = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a text",
        dict: "an object",
    }
    return names.get(type(value), "a list" if isinstance(value, list | tuple) else type(value).__name__)


@dataclass(frozen=True, slots=True)
class Triples:
    """Subject, relation, object; in the order of the data."""

    triples: tuple[tuple[str, str, str], ...]

    @classmethod
    def of(cls, content: Any) -> Triples:
        """From a list of `subject | relation | object` or `[subject, relation, object]`.

        Raises DataError for any other shape, an empty part and an empty list.
        """
        if not isinstance(content, list):
            raise DataError(f"triples must be a list, this is {kind_of(content)}")
        if not content:
            raise DataError("there is no triple in the list")
        return cls(tuple(_triple(t) for t in content))


def _triple(triple: Any) -> tuple[str, str, str]:
    parts = triple.split(" | ") if isinstance(triple, str) else triple
    if not isinstance(parts, list) or len(parts) != 3 or not all(isinstance(p, str) and p.strip() for p in parts):
        raise DataError(f"{str(triple)[:60]!r} is no triple 'subject | relation | object'")
    return parts[0], parts[1], parts[2]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class Chat:
    """The turns before the one to be written."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Words:
    """A text as words, each of which has a tag."""

    words: tuple[str, ...]


Source = str | Table | Triples | Chat | Words


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A source with every target known for it.

    Several rows of a file with one source become one example with several targets: that is what makes
    packed rows possible, and what a multi-reference score needs.
    """

    source: Source
    targets: tuple[str, ...] = ()
    where: str = ""
    """File and line of the first row, as an error message would name it: ``menus.csv, line 3``."""
    condition: str | None = None
    """A second text, for methods that read one beside the source (a parse)."""
    choices: tuple[str, ...] = ()
    """Texts of which the target is one, for tasks that rank."""
    labels: dict[str, str] = field(default_factory=dict)
    """What else the row said (category, split, id): never shown to the model."""

    @property
    def asked(self) -> tuple[Source, str | None, tuple[str, ...]]:
        """All that an answer to it depends on."""
        return self.source, self.condition, self.choices
