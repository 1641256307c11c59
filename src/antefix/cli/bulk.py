"""What `antefix generate --prefix-column` does before it writes: every row's prefix is found and looked at.

Imported inside the command alone: it needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from antefix.bank import Bank
from antefix.base import Base
from antefix.bulk import Writer, answer_all
from antefix.data.example import Example
from antefix.data.groups import read_named
from antefix.data.linearise import TextFormat, default_format
from antefix.decoding import Decoding
from antefix.errors import BankError, GenerationError, PrefixFileError
from antefix.generation import default_decoding
from antefix.prefix import BaseRecord, Card
from antefix.settings import override, validated
from antefix.tasks import TextTask
from antefix.tensor_file import TENSORS_FILE


@dataclass(frozen=True, slots=True)
class Bulk:
    """Rows that name their prefixes, ready to be answered."""

    sources: list[Example]
    writers: list[Writer]
    """Of every source."""
    cards: list[Card | None]
    """Of every source's prefix."""
    bank: Bank
    base: BaseRecord | None
    """Of the prefixes that rows name."""
    decides: list[str]
    """What the answers depend on, beside the base."""

    def answers(
        self, base: Base, left: Sequence[int], *, resident_bytes: int, batch_size: int, on_cut: Callable[[int], None]
    ) -> Iterator[tuple[int, str]]:
        """Of these sources: `(place in left, answer)`."""
        sources, writers = [self.sources[n] for n in left], [self.writers[n] for n in left]
        return answer_all(
            base, sources, writers, self.bank.__getitem__,
            resident_bytes=resident_bytes, batch_size=batch_size, on_cut=on_cut,
        )  # fmt: skip


def prepare_bulk(
    input_file: str, how: dict[str, Any], column: str, bank_folder: Path, base: str | None, decoding: list[str],
    text: list[str], limit: int | None,
) -> Bulk:  # fmt: skip
    """Read the file, and the cards of all prefixes that it names.

    how: what `antefix.read` takes beside the file. decoding, text: changes to what every card says. Raises
    GenerationError for a prefix that is not there, naming the row, and for prefixes of unlike bases.
    """
    sources, names = read_named(input_file, column, **how)
    sources, names = sources[:limit], names[:limit]
    bank = Bank(bank_folder)
    cards: dict[str, Card] = {}
    for source, name in zip(sources, names, strict=True):
        if name is not None and name not in cards:
            try:
                cards[name] = bank.card(name)
            except BankError as error:
                raise GenerationError(f"{source.where}: {error}") from error
    _check_one_base(cards)
    some = next(iter(cards.values()), None)
    if some is None and base is None:
        raise GenerationError(f"no row of {input_file} names a prefix in '{column}': say which bare base (--base)")
    writers: dict[str | None, Writer] = {n: _writer(n, card, bank, decoding, text) for n, card in cards.items()}
    bare = [source for source, name in zip(sources, names, strict=True) if name is None]
    if bare:
        writers[None] = _bare_writer(bare, decoding, text)
    decides = [*(card.model_dump_json() for card in cards.values()), repr(names), repr([s.asked for s in sources])]
    decides += [*decoding, "", *text]
    of_rows = [None if n is None else cards[n] for n in names]
    return Bulk(sources, [writers[n] for n in names], of_rows, bank, None if some is None else some.base, decides)


def _check_one_base(cards: dict[str, Card]) -> None:
    first = next(iter(cards.items()), None)
    for name, card in cards.items():
        if first is not None and card.base.fingerprint != first[1].base.fingerprint:
            raise GenerationError(
                f"'{first[0]}' was trained for the base '{first[1].base.name}', '{name}' for '{card.base.name}': put "
                "the rows of each base into a file of their own"
            )


def _writer(name: str, card: Card, bank: Bank, decoding: list[str], text: list[str]) -> Writer:
    tensors = bank.path(name) / TENSORS_FILE
    if not tensors.is_file():
        raise PrefixFileError(f"{tensors}: no such file; `antefix bank verify` finds broken prefixes")
    return Writer(
        name=name,
        task=card.task,
        text_format=TextFormat.from_dict(override(dict(card.text_format), text)),
        decoding=validated(Decoding, override(dict(card.decoding), decoding), "decoding option "),
        num_bytes=tensors.stat().st_size,
    )


def _bare_writer(sources: Sequence[Example], decoding: list[str], text: list[str]) -> Writer:
    of_sources = default_decoding(sources).model_dump(exclude_defaults=True)
    return Writer(
        name=None,
        task=TextTask(),
        text_format=TextFormat.from_dict(override(default_format([e.source for e in sources]).to_dict(), text)),
        decoding=validated(Decoding, override(of_sources, decoding), "decoding option "),
        num_bytes=0,
    )
