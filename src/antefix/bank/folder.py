"""The bank itself: what is in a folder of kept prefixes, and what may be done to it.

A prefix is read when it is asked for, straight from its files. Lists come from an index beside the prefixes (see
`antefix.bank.index`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TypeVar

from antefix import atomic
from antefix.bank.entry import NAME, NAME_RULE, Entry, folder_stamp
from antefix.bank.index import Index, Watch, folders_in
from antefix.bank.query import Page, Query
from antefix.base import Base
from antefix.errors import BankError, PrefixError, PrefixFileError, nearest, one_line
from antefix.prefix import CARD_FILE, Card, Prefix, read_card
from antefix.tensor_file import TENSORS_FILE

_FEW = 30
Read = TypeVar("Read")


class Bank:
    """`bank["menus"]`, `"menus" in bank`, `for name in bank`, `len(bank)`."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._index = Index(self.folder)

    def __getitem__(self, name: str) -> Prefix:
        """The prefix of this name, read and checked. Raises BankError (no such name), PrefixFileError (broken)."""
        return self.read(name, Prefix.load)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and bool(NAME.fullmatch(name)) and _is_prefix(self.folder / name)

    def __iter__(self) -> Iterator[str]:
        """The names, sorted, broken prefixes included. Raises BankError if there is no such folder."""
        return iter(sorted(e.name for e in folders_in(self.folder) if _is_prefix(Path(e.path))))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def path(self, name: str) -> Path:
        """The folder that a prefix of this name has, or would have. Raises BankError for a name that cannot be one."""
        if not NAME.fullmatch(name):
            raise BankError(f"'{one_line(name, 60)}' cannot be a prefix's name: {NAME_RULE}")
        return self.folder / name

    def add(self, name: str, prefix: Prefix) -> Path:
        """Keep a prefix under a name. Raises BankError for a taken name, PrefixFileError where it cannot be written."""
        self.refuse_taken(name)
        try:
            return prefix.save(self.path(name))
        except PrefixFileError:
            self.refuse_taken(name)  # somebody else took it meanwhile
            raise

    def card(self, name: str) -> Card:
        """What a prefix says about itself, without its tensors. Raises BankError, PrefixFileError."""
        return self.read(name, read_card)

    def page(self, query: Query | None = None) -> Page:
        """A part of the list of prefixes: by default the first 50 by name. Raises BankError.

        What it shows is what is on disk. A card that was edited by hand in its place is *found* by what it said
        before, until `refresh` or `entries`.
        """
        return self._index.page(query or Query())

    def refresh(self, watch: Watch | None = None) -> None:
        """Compare every file with the index. watch: told how many of how many cards are read. Raises BankError."""
        self._index.refresh(watch)

    def entries(self, watch: Watch | None = None) -> list[Entry]:
        """Every prefix by name, every file compared with the index first. Raises BankError."""
        return self._index.all(watch)

    def latest(self, stem: str) -> str:
        """The name of the latest version of a name: `menus.v12` of `menus`, `menus.v3` and `menus.v12`.

        Raises BankError where there is none.
        """
        self.path(stem)
        found = self.page(Query(stem=stem, latest=True, broken=False, limit=1)).entries
        if not found:
            raise BankError(f"no prefix '{stem}' and no version of it ('{stem}.v1') in the bank '{self.folder}'")
        return found[0].name

    def children(self) -> dict[str, list[str]]:
        """Name -> the prefixes whose cards name it as a parent. Raises BankError."""
        return self._index.children()

    def clean(self, older_than_s: float = 3600.0) -> list[str]:
        """Delete what interrupted writes left behind, if nothing in it changed for so long; the names of it.

        Never a prefix: what is left behind has a name that no prefix can have. Raises BankError.
        """
        try:
            return [
                path.name for path in atomic.leftovers(self.folder, time.time() - older_than_s) if atomic.delete(path)
            ]
        except OSError as error:
            raise BankError(f"'{self.folder}' is no bank: {error.strerror or error}") from error

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
            problem = _problem(name, path, base)
            if problem is None or names is not None or _is_prefix(path):  # else it was removed meanwhile
                yield name, problem

    def _existing(self, name: str) -> Path:
        path = self.path(name)
        if not _is_prefix(path):
            names = [entry.name for entry in islice(folders_in(self.folder), _FEW + 1)]
            few = len(names) <= _FEW
            known = nearest(name, sorted(names)) if few else f"`antefix bank list --text {name}` looks for it"
            raise BankError(f"no prefix '{name}' in the bank '{self.folder}': {known}")
        return path

    def refuse_taken(self, name: str) -> None:
        """Raises BankError for a name that a prefix has, or that none can have."""
        if os.path.lexists(self.path(name)):
            raise BankError(f"'{name}' is taken in the bank '{self.folder}': choose another name, or remove it first")

    def read(self, name: str, read: Callable[[Path], Read]) -> Read:
        """What is read of a prefix's folder: of one, whole, also while others replace it.

        Raises BankError for a missing name, and the PrefixFileError that reading raises.
        """
        while True:
            path = self._existing(name)
            before = _which(path)
            try:
                return read(path)
            except PrefixFileError:
                if before is not None and _which(path) == before:
                    raise  # it is broken; else it was removed or replaced while it was read


def _problem(name: str, path: Path, base: Base | None) -> str | None:
    if not NAME.fullmatch(name):
        return f"not a name: {NAME_RULE}; rename the folder"
    try:
        prefix = Prefix.load(path)
        if base is not None:
            prefix.module(base.model)
    except PrefixError as error:
        return str(error)
    return None


def _is_prefix(path: Path) -> bool:
    return (path / CARD_FILE).exists() or (path / TENSORS_FILE).exists()


def _which(path: Path) -> str | None:
    try:
        return folder_stamp(path.stat())
    except OSError:
        return None
