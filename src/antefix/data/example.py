"""One example: a source, its targets, and where it came from. Knows nothing of files, tokens or models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class Table:
    """Ordered fields with their values; a field may occur twice."""

    fields: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Triples:
    """Subject, relation, object; in the order of the data."""

    triples: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class Chat:
    """The turns before the one to be written."""

    messages: tuple[Message, ...]


Source = str | Table | Triples | Chat


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
    labels: dict[str, str] = field(default_factory=dict)
    """What else the row said (category, split, id): never shown to the model."""
