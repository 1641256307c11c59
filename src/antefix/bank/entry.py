"""One line of a bank's list, read off a prefix's card; no tensor is read for it."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from antefix.errors import PrefixError
from antefix.prefix import CARD_FILE, Card, read_card
from antefix.tensor_file import TENSORS_FILE

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", re.ASCII)
NAME_RULE = "letters, digits, '_', '-' and '.', a letter or digit first, at most 100"
_VERSION = re.compile(r"(.+)\.v(0|[1-9][0-9]{0,8})", re.ASCII)

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
    parents: tuple[str, ...] = ()
    """The names of the prefixes that it was made from."""
    licence: str | None = None
    scores: dict[str, Any] = {}
    """See `latest_scores`."""


class Stamps(NamedTuple):
    """What a prefix's folder and its two files were when they were looked at."""

    folder: str
    """Inode, and time of the last change in ns: of the folder's own name, and of what stands in it."""
    card: Stamp
    tensors: Stamp

    @property
    def is_prefix(self) -> bool:
        return self.card is not None or self.tensors is not None


class Seen(NamedTuple):
    """What was found under a name."""

    stamps: Stamps
    entry: Entry
    words: str
    """What a search for text looks through: name, tags and notes."""


def stamps_of(path: str) -> Stamps | None:
    """Of a prefix's folder; None where there is no folder."""
    try:
        folder = os.stat(path)
    except OSError:
        return None
    if not stat.S_ISDIR(folder.st_mode):
        return None
    return Stamps(folder_stamp(folder), _stamp(f"{path}/{CARD_FILE}"), _stamp(f"{path}/{TENSORS_FILE}"))


def folder_stamp(status: os.stat_result) -> str:
    """A folder that took another's name has another inode, or was renamed later, which sets the time of its change."""
    return f"{status.st_ino} {status.st_ctime_ns}"


def read_entry(folder: str, name: str) -> Seen | None:
    """Read a prefix's card; None where there is no such folder. Stamps are taken first: a later change is noticed."""
    path = f"{folder}/{name}"
    stamps = stamps_of(path)
    if stamps is None:
        return None
    if not NAME.fullmatch(name):
        return _broken(stamps, name, f"not a name: {NAME_RULE}; rename the folder")
    if stamps.tensors is None:
        return _broken(stamps, name, f"{TENSORS_FILE} is missing")
    try:
        card = read_card(Path(path))
    except PrefixError as error:
        return _broken(stamps, name, str(error))
    entry = Entry(
        name=name, method=card.method, positions=card.positions,
        num_virtual_tokens=card.num_virtual_tokens,
        base=card.base.name, fingerprint=card.base.fingerprint, num_bytes=stamps.tensors[2],
        tags=card.tags, parents=card.parents, licence=card.licence,
        scores=latest_scores(card),
    )  # fmt: skip
    return Seen(stamps, entry, "\n".join([name, *card.tags, card.notes]).casefold())


def latest_scores(card: Card) -> dict[str, Any]:
    """Of a score that was taken several times during training, the last."""
    return {k: v[-1] if isinstance(v, list) and v else v for k, v in card.scores.items()}


def version_of(name: str) -> tuple[str, int]:
    """`menus.v3` is version 3 of `menus`; a name without `.v<number>` is the first of its name, version 0."""
    found = _VERSION.fullmatch(name)
    return (found[1], int(found[2])) if found else (name, 0)


def _broken(stamps: Stamps, name: str, problem: str) -> Seen:
    return Seen(stamps, Entry(name=name, problem=problem), name.casefold())


def _stamp(path: str) -> Stamp:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
