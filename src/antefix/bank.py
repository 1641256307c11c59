"""A bank: a folder of kept prefixes, each under its own name. Knows files and fingerprints; trains nothing.

A prefix is read when it is asked for. Lists come from an index beside the prefixes, which follows the files: an
entry is read anew when its card or its tensor file is another one than before. No tensor is read for a list, and
a broken prefix is listed with its reason.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from antefix import atomic
from antefix.base import Base
from antefix.errors import BankError, PrefixError, nearest, one_line
from antefix.prefix import CARD_FILE, Card, Prefix, read_card
from antefix.tensor_file import TENSORS_FILE

INDEX_FILE = ".index.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", re.ASCII)
_NAME_RULE = "letters, digits, '_', '-' and '.', a letter or digit first, at most 100"
_FEW = 30

Stamp = tuple[int, int, int] | None
"""What tells one file from another under the same name: inode, modification time in ns, bytes. None: no file."""


class Entry(BaseModel):
    """One line of a bank's list."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    problem: str | None = None
    """Why the prefix is broken; None where its card is good. Tensors are checked by `verify`."""
    method: str | None = None
    positions: str | None = None
    num_virtual_tokens: int | None = None
    base: str | None = None
    fingerprint: str | None = None
    num_bytes: int | None = None
    """Size of the tensor file."""
    tags: tuple[str, ...] = ()
    licence: str | None = None
    scores: dict[str, Any] = {}
    """Of a score that was taken several times during training, the last."""


class _Indexed(BaseModel):
    card: Stamp
    tensors: Stamp
    entry: Entry


class _Index(BaseModel):
    version: int
    prefixes: dict[str, _Indexed]


class Bank:
    """`bank["menus"]`, `"menus" in bank`, `for name in bank`, `len(bank)`."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def __getitem__(self, name: str) -> Prefix:
        """The prefix of this name, read and checked. Raises BankError (no such name), PrefixFileError (broken)."""
        return Prefix.load(self._existing(name))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and bool(_NAME.fullmatch(name)) and _is_prefix(self.folder / name)

    def __iter__(self) -> Iterator[str]:
        """The names, sorted, broken prefixes included. Raises BankError if there is no such folder."""
        return (name for name, _, _ in self._stamps())

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def path(self, name: str) -> Path:
        """The folder that a prefix of this name has, or would have. Raises BankError for a name that cannot be one."""
        if not _NAME.fullmatch(name):
            raise BankError(f"'{one_line(name, 60)}' cannot be a prefix's name: {_NAME_RULE}")
        return self.folder / name

    def add(self, name: str, prefix: Prefix) -> Path:
        """Keep a prefix under a name. Raises BankError for a taken name, PrefixFileError where it cannot be written."""
        self.refuse_taken(name)
        return prefix.save(self.path(name))

    def card(self, name: str) -> Card:
        """What a prefix says about itself, without its tensors. Raises BankError, PrefixFileError."""
        return read_card(self._existing(name))

    def entries(self) -> list[Entry]:
        """Every prefix by name, from the index; what changed since is read anew. Raises BankError."""
        known = self._read_index()
        found: dict[str, _Indexed] = {}
        for name, card, tensors in self._stamps():
            indexed = known.get(name)
            # A broken prefix is always looked at again: another version of Antefix may well read it.
            if indexed is None or (indexed.card, indexed.tensors) != (card, tensors) or indexed.entry.problem:
                indexed = _Indexed(card=card, tensors=tensors, entry=self._look(name, tensors))
            found[name] = indexed
        if found != known:
            self._write_index(found)
        return [indexed.entry for indexed in found.values()]

    def rename(self, old: str, new: str) -> None:
        """Give a prefix another name, atomically. Raises BankError for a missing or a taken name."""
        source, target = self._existing(old), self.path(new)
        self.refuse_taken(new)
        try:
            os.rename(source, target)  # never onto another prefix: a folder with content is not replaced
        except OSError as error:
            raise BankError(f"'{old}' could not be renamed to '{new}': {error.strerror or error}") from error

    def remove(self, name: str) -> None:
        """Delete a prefix; of a linked one, the link. Raises BankError for a missing name."""
        path = self._existing(name)
        try:
            atomic.remove_folder(path)
        except OSError as error:
            raise BankError(f"'{name}' could not be removed: {error.strerror or error}") from error

    def verify(self, names: Iterable[str] | None = None, base: Base | None = None) -> Iterator[tuple[str, str | None]]:
        """`(name, problem or None)`, reading every byte of the prefixes (None: of all).

        With a base: whether they were trained for it, and their tensors fit it. Raises BankError for a missing name.
        """
        for name in list(self) if names is None else names:
            path = self.folder / name if names is None else self._existing(name)
            yield name, _problem(name, path, base)

    def _look(self, name: str, tensors: Stamp) -> Entry:
        if not _NAME.fullmatch(name):
            return Entry(name=name, problem=f"not a name: {_NAME_RULE}; rename the folder")
        if tensors is None:
            return Entry(name=name, problem=f"{TENSORS_FILE} is missing")
        try:
            card = read_card(self.folder / name)
        except PrefixError as error:
            return Entry(name=name, problem=str(error))
        slots = card.config.get("num_virtual_tokens")
        return Entry(
            name=name, method=card.method, positions=card.positions,
            num_virtual_tokens=slots if isinstance(slots, int) else None,
            base=card.base.name, fingerprint=card.base.fingerprint, num_bytes=tensors[2],
            tags=card.tags, licence=card.licence,
            scores={k: v[-1] if isinstance(v, list) and v else v for k, v in card.scores.items()},
        )  # fmt: skip

    def _stamps(self) -> list[tuple[str, Stamp, Stamp]]:
        """Name, stamp of the card and of the tensor file of every folder that holds one of them."""
        try:
            with os.scandir(self.folder) as found:
                names = sorted(e.name for e in found if not e.name.startswith(".") and e.is_dir())
        except FileNotFoundError as error:
            raise BankError(
                f"there is no bank '{self.folder}': train a prefix into it, or name another folder"
            ) from error
        except OSError as error:
            raise BankError(f"'{self.folder}' is no bank: {error.strerror or error}") from error
        folder = os.fspath(self.folder)
        stamps = ((n, _stamp(f"{folder}/{n}/{CARD_FILE}"), _stamp(f"{folder}/{n}/{TENSORS_FILE}")) for n in names)
        return [(name, card, tensors) for name, card, tensors in stamps if card or tensors]

    def _existing(self, name: str) -> Path:
        path = self.path(name)
        if not _is_prefix(path):
            names = list(self)
            known = nearest(name, names) if len(names) <= _FEW else f"it has {len(names):,} others"
            raise BankError(f"no prefix '{name}' in the bank '{self.folder}': {known}")
        return path

    def refuse_taken(self, name: str) -> None:
        """Raises BankError for a name that a prefix has, or that none can have."""
        if os.path.lexists(self.path(name)):
            raise BankError(f"'{name}' is taken in the bank '{self.folder}': choose another name, or remove it first")

    def _read_index(self) -> dict[str, _Indexed]:
        try:
            index = _Index.model_validate_json((self.folder / INDEX_FILE).read_bytes())
        except (OSError, ValidationError):
            return {}  # none yet, or not ours: it is made anew
        return index.prefixes if index.version == 1 else {}

    def _write_index(self, found: dict[str, _Indexed]) -> None:
        content = _Index(version=1, prefixes=found).model_dump_json(exclude_defaults=True).encode()
        try:
            atomic.write_bytes(self.folder / INDEX_FILE, content)
        except OSError:
            return  # a bank that may not be written to is listed without an index


def _problem(name: str, path: Path, base: Base | None) -> str | None:
    if not _NAME.fullmatch(name):
        return f"not a name: {_NAME_RULE}; rename the folder"
    try:
        prefix = Prefix.load(path)
        if base is not None:
            prefix.module(base.model)
    except PrefixError as error:
        return str(error)
    return None


def _is_prefix(path: Path) -> bool:
    return (path / CARD_FILE).exists() or (path / TENSORS_FILE).exists()


def _stamp(path: str) -> Stamp:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
