"""Texts or labels for many rows, each of which names its own prefix, or none.

Rows of unlike prefixes share a batch, sorted by length, where their text formats and decoding options are the same.
Only so many prefixes are in memory at once: they take turns, each once, those of long sources first, so that what is in
memory together is of like lengths. Knows no bank: it is given what prefixes need, and a way to load them.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from antefix.at_work import BARE
from antefix.attach import attached
from antefix.base import Base
from antefix.data.example import Chat, Example, Table, Triples, Words
from antefix.data.linearise import TextFormat
from antefix.decoding import Decoding
from antefix.generation import generate_each
from antefix.labels import label_each
from antefix.prefix import Prefix
from antefix.tasks import RankingTask, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """What answers a row: a prefix, or the bare base."""

    name: str | None
    """Of the prefix; None: the bare base."""
    task: Task
    text_format: TextFormat
    decoding: Decoding
    num_bytes: int
    """Of its tensors in memory."""

    @property
    def kind(self) -> tuple[str, ...]:
        """Who shares batches: writers of the same kind."""
        if isinstance(self.task, RankingTask):
            return "ranking", str(self.name)
        if not self.task.writes_text:
            return "labels", self.text_format.model_dump_json()
        return self.text_format.model_dump_json(), self.decoding.model_dump_json()


@dataclass(frozen=True, slots=True)
class Round:
    """Writers who are in memory together, and their rows."""

    writers: list[Writer]
    rows: list[int]
    """Of all rows."""


def rounds(writers: Sequence[Writer], sources: Sequence[Example], resident_bytes: int) -> list[Round]:
    """Every row in the round of its writer.

    writers: of every row. resident_bytes: what the writers of a round may have together; one that is larger has a round
    of its own.
    """
    known = {writer.name: writer for writer in writers}
    rows: dict[str | None, list[int]] = defaultdict(list)
    for row, writer in enumerate(writers):
        rows[writer.name].append(row)
    lengths = [_length(source) for source in sources]
    mean = {name: statistics.mean(lengths[n] for n in some) for name, some in rows.items()}
    found: list[Round] = []
    for writer in sorted(known.values(), key=lambda w: (w.kind, -mean[w.name], w.name or "")):
        last = found[-1] if found else None
        if (
            last is None
            or last.writers[0].kind != writer.kind
            or sum(w.num_bytes for w in last.writers) + writer.num_bytes > resident_bytes
        ):
            last = Round([], [])
            found.append(last)
        last.writers.append(writer)
        last.rows.extend(rows[writer.name])
    return found


def answer_all(
    base: Base,
    sources: Sequence[Example],
    writers: Sequence[Writer],
    load: Callable[[str], Prefix],
    *,
    resident_bytes: int,
    batch_size: int = 16,
    on_cut: Callable[[int], None] = lambda num_cut: None,
) -> Iterator[tuple[int, str]]:
    """`(index, text or label)` as batches are done.

    writers: of every row. load: a prefix by name. on_cut: see `generate_each`. Raises what it does, and WrongBaseError
    for a prefix of another base.
    """
    for one in rounds(writers, sources, resident_bytes):
        # In a function of its own, so that no prefix of a round is in memory when those of the next are read.
        yield from _answered(base, one, sources, writers, load, batch_size, on_cut)


def _answered(
    base: Base, one: Round, sources: Sequence[Example], writers: Sequence[Writer], load: Callable[[str], Prefix],
    batch_size: int, on_cut: Callable[[int], None],
) -> Iterator[tuple[int, str]]:  # fmt: skip
    """The rows of one round."""
    prefixes = {w.name: load(w.name) for w in one.writers if w.name is not None}
    places = {name: n for n, name in enumerate(prefixes)}
    first = one.writers[0]
    chosen = [sources[n] for n in one.rows]
    with attached(base.model, *prefixes.values()) if prefixes else nullcontext() as attachment:
        if attachment is not None:
            attachment.rows = [BARE if (name := writers[n].name) is None else places[name] for n in one.rows]
        if not first.task.writes_text:
            answers = label_each(base, chosen, text_format=first.text_format, batch_size=batch_size)
        else:
            answers = generate_each(
                base,
                chosen,
                text_format=first.text_format,
                decoding=first.decoding,
                batch_size=batch_size,
                on_cut=on_cut,
            )
        yield from ((one.rows[place], text) for place, text in answers)


def _length(example: Example) -> int:
    """Characters: what tokens are sorted by later is not known yet."""
    source = example.source
    if isinstance(source, Table):
        return sum(len(field) + len(value) for field, value in source.fields)
    if isinstance(source, Triples):
        return sum(len(part) for triple in source.triples for part in triple)
    if isinstance(source, Chat):
        return sum(len(message.content) for message in source.messages)
    return sum(map(len, source.words)) if isinstance(source, Words) else len(source)
