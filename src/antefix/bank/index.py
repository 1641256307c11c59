"""Where lists of a bank come from: an index in SQLite beside the prefixes, which follows the files.

The prefixes are the truth; the index can be deleted at any time and is then made anew. SQLite, because a page of a
list of 100,000 is had without reading the rest, and because readers and writers of several processes may meet in it
(write-ahead log, busy timeout). It stands in a folder of its own, `.index`: the log's files come and go, which would
change the bank's folder, and by that change we know what is stale:

- The bank's folder has another modification time: prefixes were added, removed, renamed or replaced. Every prefix's
  folder is compared with the one that was looked at (inode and time of change, one call of the system for each);
  cards are read of those alone that are others. A folder that was changed less than two seconds before it was looked
  at is compared again the next time, since a second change may bear the same time.
- What was no whole prefix when it was looked at (a copy that is under way, a broken card) is looked at every time.
- What is shown is looked at every time: a page never shows a card that is not the one on disk.
- A card that was edited by hand inside its folder, which changes no other folder, is therefore shown as it is; a
  *filter* goes by what the index knows of it until `refresh`, which compares every file, or `Bank.entries`.

One prefix by name (`Bank[name]`) is always read from its files and needs no index.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from antefix import atomic
from antefix.bank.entry import Entry, Seen, Stamps, folder_stamp, read_entry, stamps_of, version_of
from antefix.bank.query import SEPARATOR, Page, Query, listed, order, where
from antefix.errors import BankError

INDEX_FOLDER, INDEX_FILE = ".index", "prefixes.sqlite"
_VERSION = 2
_BUSY_SECONDS = 60.0
_SETTLED_NS = 2_000_000_000
_ROWS = 500
"""How many names one statement takes."""
_GOOD, _BROKEN, _NO_PREFIX = 0, 1, 2

_SCHEMA = f"""
CREATE TABLE folder (stamp TEXT, is_settled INTEGER);
CREATE TABLE seen (name TEXT PRIMARY KEY, kind INTEGER, folder TEXT, files TEXT) WITHOUT ROWID;
CREATE TABLE shown (name TEXT PRIMARY KEY, entry TEXT) WITHOUT ROWID;
CREATE TABLE prefix (
    name TEXT PRIMARY KEY, kind INTEGER, stem TEXT, version INTEGER, is_latest INTEGER, method TEXT, base TEXT,
    fingerprint TEXT, num_bytes INTEGER, num_virtual_tokens INTEGER, changed_ns INTEGER, tags TEXT, parents TEXT,
    words TEXT
) WITHOUT ROWID;
CREATE INDEX unsure ON seen (kind);
CREATE INDEX by_stem ON prefix (stem, version);
CREATE INDEX by_changed ON prefix (changed_ns, name);
CREATE INDEX by_size ON prefix (num_bytes, name);
CREATE INDEX by_slots ON prefix (num_virtual_tokens, name);
PRAGMA user_version = {_VERSION};
"""

_KNOWN = "SELECT name, folder, files FROM seen"

Answer = TypeVar("Answer")
Watch = Callable[[int, int], None]
"""Told how many of how many cards are read."""


class Index:
    """The index of one bank's folder. Every call opens and closes the database: it may be asked from any thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def page(self, query: Query) -> Page:
        """Raises BankError where there is no such folder."""
        return self._asked(lambda db: self._page(db, query))

    def refresh(self, watch: Watch | None = None) -> None:
        """Compare every file with what is known of it. Raises BankError."""
        self._asked(lambda db: self._follow(db, every_file=True, watch=watch))

    def all(self, watch: Watch | None = None) -> list[Entry]:
        """Every prefix by name, after a refresh. Raises BankError."""

        def ask(db: sqlite3.Connection) -> list[Entry]:
            self._follow(db, every_file=True, watch=watch)
            rows = db.execute("SELECT entry FROM shown ORDER BY name")
            return [Entry.model_validate_json(entry) for (entry,) in rows]

        return self._asked(ask)

    def children(self) -> dict[str, list[str]]:
        """Name -> the prefixes that were made from it, sorted; after a refresh. Raises BankError."""

        def ask(db: sqlite3.Connection) -> dict[str, list[str]]:
            self._follow(db, every_file=True)
            found: dict[str, list[str]] = {}
            for name, parents in db.execute("SELECT name, parents FROM prefix WHERE parents <> '' ORDER BY name"):
                for parent in parents.strip(SEPARATOR).split(SEPARATOR):
                    found.setdefault(parent, []).append(name)
            return found

        return self._asked(ask)

    # ---- following the files

    def _follow(self, db: sqlite3.Connection, *, every_file: bool = False, watch: Watch | None = None) -> None:
        status, began_ns = _status(self._folder), time.time_ns()
        stamp = f"{status.st_ino} {status.st_mtime_ns}"
        if not every_file and db.execute("SELECT * FROM folder").fetchone() == (stamp, 1):
            unsure = db.execute(f"{_KNOWN} WHERE kind > 0").fetchall()
            self._write(db, *self._changes(unsure, [row[0] for row in unsure]), None)
            return
        found = _folders(self._folder)
        known = db.execute("SELECT name, folder, files, kind FROM seen").fetchall()
        if every_file:  # a broken one is read again: another version of Antefix may well read it
            unsure = [row[:3] for row in known if row[3] != _BROKEN]
        else:
            unsure = [row[:3] for row in known if found.get(row[0]) != row[1] or row[3] != _GOOD]
        names = {row[0] for row in known}
        asked = {row[0] for row in unsure} | {row[0] for row in known if every_file} | (found.keys() - names)
        changes = self._changes(unsure, sorted(asked), watch)
        self._write(db, *changes, (stamp, int(began_ns - status.st_mtime_ns > _SETTLED_NS)))

    def _changes(
        self, known: Iterable[tuple[str, str, str]], names: list[str], watch: Watch | None = None
    ) -> tuple[list[str], list[Seen]]:
        """Of these names: which are no folder any more, and what was found anew."""
        folder, before = os.fspath(self._folder), {name: rest for name, *rest in known}
        gone: list[str] = []
        others: list[str] = []
        for name in names:
            stamps = stamps_of(f"{folder}/{name}")
            if stamps is None:
                gone.append(name)
            elif before.get(name) != _columns(stamps):
                others.append(name)
        found: list[Seen] = []
        for done, name in enumerate(others):
            if watch is not None:
                watch(done, len(others))
            if (one := read_entry(folder, name)) is None:
                gone.append(name)
            else:
                found.append(one)
        return gone, found

    def _write(self, db: sqlite3.Connection, gone: list[str], found: list[Seen], state: tuple[str, int] | None) -> None:
        """In one transaction, and only what is still true: others may have looked later, and written before us."""
        if not gone and not found and state is None:
            return
        db.execute("BEGIN IMMEDIATE")
        try:
            folder = os.fspath(self._folder)
            gone = [name for name in gone if stamps_of(f"{folder}/{name}") is None]
            found = [f for f in found if stamps_of(f"{folder}/{f.entry.name}") == f.stamps]
            touched = [*gone, *(f.entry.name for f in found)]
            for table in ("seen", "shown", "prefix"):
                db.executemany(f"DELETE FROM {table} WHERE name = ?", ((name,) for name in touched))
            prefixes = [f for f in found if f.stamps.is_prefix]
            db.executemany(
                "INSERT INTO seen VALUES (?, ?, ?, ?)", ((f.entry.name, _kind(f), *_columns(f.stamps)) for f in found)
            )
            db.executemany(
                "INSERT INTO shown VALUES (?, ?)",
                ((f.entry.name, f.entry.model_dump_json(exclude_defaults=True)) for f in prefixes),
            )
            db.executemany(f"INSERT INTO prefix VALUES ({', '.join('?' * 14)})", map(_row, prefixes))
            _mark_latest(db, {version_of(name)[0] for name in touched})
            if state is None:
                db.execute("UPDATE folder SET is_settled = 0")  # the lock may have kept us from it for long
            else:
                db.execute("DELETE FROM folder")
                db.execute("INSERT INTO folder VALUES (?, ?)", state)
            db.execute("COMMIT")
        except BaseException:
            db.execute("ROLLBACK")
            raise

    # ---- answering

    def _page(self, db: sqlite3.Connection, query: Query) -> Page:
        self._follow(db)
        condition, values = where(query)
        limit = -1 if query.limit is None else query.limit
        chosen = f"SELECT name FROM prefix WHERE {condition} ORDER BY {order(query)} LIMIT ? OFFSET ?"
        while True:
            names = [name for (name,) in db.execute(chosen, [*values, limit, query.offset])]
            known = _of_names(db, _KNOWN, names)
            gone, found = self._changes(known, names)
            if not gone and not found:
                break
            self._write(db, gone, found, None)  # then ask again: it may belong elsewhere, or not to this list
        shown: dict[str, str] = dict(_of_names(db, "SELECT name, entry FROM shown", names))
        total = query.offset + len(names)
        if len(names) == query.limit or (query.offset and not names):  # else this was the end of the list
            (total,) = db.execute(f"SELECT count(*) FROM prefix WHERE {condition}", values).fetchone()
        return Page([Entry.model_validate_json(shown[name]) for name in names if name in shown], total)

    # ---- the database

    def _asked(self, ask: Callable[[sqlite3.Connection], Answer]) -> Answer:
        """The answer from the index; from one in memory where none can be kept beside the prefixes."""
        _status(self._folder)
        deadline, was_discarded = time.monotonic() + _BUSY_SECONDS, False
        while True:
            try:
                with self._opened() as db:
                    return ask(db)
            except sqlite3.DatabaseError as error:
                if _is_busy(error):
                    if time.monotonic() > deadline:
                        raise BankError(f"the index of '{self._folder}' is busy: other processes write it") from error
                    time.sleep(0.05)
                elif was_discarded or _cannot_be_kept(error) or not self._discard():
                    break
                else:
                    was_discarded = True
        with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
            db.executescript(_SCHEMA)
            return ask(db)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        path = self._folder / INDEX_FOLDER / INDEX_FILE
        if path.parent.is_dir() and not path.is_file():
            self._discard()
        if not os.path.lexists(path.parent):
            _make(path.parent)
        uri = f"{path.absolute().as_uri()}?mode=rw"
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=_BUSY_SECONDS, isolation_level=None)) as db:
            db.execute("PRAGMA synchronous = NORMAL")  # it can be made anew: a crash may cost the last change
            if db.execute("PRAGMA user_version").fetchone() != (_VERSION,):
                raise sqlite3.DatabaseError("an index of another version")
            yield db

    def _discard(self) -> bool:
        """Take away an index that is none, or of another version; whether one can be made in its place."""
        try:
            atomic.remove_folder(self._folder / INDEX_FOLDER)
        except FileNotFoundError:
            return True  # another process was first
        except OSError:
            return False
        return True


def _make(folder: Path) -> None:
    """A new, empty index appears whole: two processes cannot make it at once."""
    try:
        with (
            atomic.new_folder(folder) as scratch,
            contextlib.closing(sqlite3.connect(scratch / INDEX_FILE, isolation_level=None)) as db,
        ):
            db.execute("PRAGMA page_size = 16384")  # filters read every row, and rows are long
            db.execute("PRAGMA journal_mode = WAL")
            db.executescript(_SCHEMA)
    except OSError:
        return  # another process was first, or it cannot be: opening it tells


def _is_busy(error: sqlite3.DatabaseError) -> bool:
    return _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _cannot_be_kept(error: sqlite3.DatabaseError) -> bool:
    """Whether no index can be written here (no permission, no space), as against one that is broken."""
    codes = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL,
             sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH)  # fmt: skip
    return _code(error) in codes


def _code(error: sqlite3.DatabaseError) -> int:
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF  # the rest says more exactly what


def _status(folder: Path) -> os.stat_result:
    try:
        return os.stat(folder)
    except FileNotFoundError as error:
        raise no_bank(folder) from error
    except OSError as error:
        raise BankError(f"'{folder}' is no bank: {error.strerror or error}") from error


def no_bank(folder: Path) -> BankError:
    return BankError(f"there is no bank '{folder}': train a prefix into it, or name another folder")


def folders_in(folder: Path) -> Iterator[os.DirEntry[str]]:
    """The folders that may hold a prefix, as they come. Raises BankError."""
    try:
        with os.scandir(folder) as found:
            yield from (e for e in found if not e.name.startswith(".") and _is_text(e.name) and e.is_dir())
    except FileNotFoundError as error:
        raise no_bank(folder) from error
    except OSError as error:
        raise BankError(f"'{folder}' is no bank: {error.strerror or error}") from error


def _is_text(name: str) -> bool:
    """Whether a name in the file system is UTF-8; no other can be shown, or asked for."""
    return name.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in name)


def _folders(folder: Path) -> dict[str, str]:
    found = {}
    for entry in folders_in(folder):
        with contextlib.suppress(OSError):  # it went meanwhile
            found[entry.name] = folder_stamp(entry.stat())
    return found


def _columns(stamps: Stamps) -> list[object]:
    return [stamps.folder, f"{stamps.card} {stamps.tensors}"]


def _kind(found: Seen) -> int:
    return _NO_PREFIX if not found.stamps.is_prefix else _BROKEN if found.entry.problem else _GOOD


def _row(found: Seen) -> tuple[object, ...]:
    entry, card = found.entry, found.stamps.card
    return (
        entry.name, _kind(found), *version_of(entry.name), 0, entry.method, entry.base, entry.fingerprint,
        entry.num_bytes, entry.num_virtual_tokens, card[1] if card else None, listed(entry.tags), listed(entry.parents),
        found.words,
    )  # fmt: skip


def _mark_latest(db: sqlite3.Connection, stems: Iterable[str]) -> None:
    db.executemany(
        "UPDATE prefix SET is_latest = "
        "(version = (SELECT max(version) FROM prefix AS other WHERE other.stem = prefix.stem)) WHERE stem = ?",
        ((stem,) for stem in stems),
    )


def _of_names(db: sqlite3.Connection, select: str, names: list[str]) -> list[Any]:
    rows: list[Any] = []
    for start in range(0, len(names), _ROWS):
        part = names[start : start + _ROWS]
        rows += db.execute(f"{select} WHERE name IN ({', '.join('?' * len(part))})", part)
    return rows
