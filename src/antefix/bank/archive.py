"""A bank, or a part of one, in a single file: a plain tar archive of its prefixes' folders.

Not compressed: tensors hardly shrink, and an archive that is not compressed cannot claim to be larger than it is. What
is read is the oldest form alone (ustar): regular files, their names in their headers; a name is a prefix's name and
one of its two files. There is nothing in such an archive that could lead out of the bank, and whatever else a tar
archive may hold (links, devices, long names, sparse files) is refused before anything is written. Every prefix is
checked like any that is loaded. `tar` reads and writes these archives too: `tar --format=ustar`.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterable, Sequence
from hashlib import file_digest
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

from antefix import atomic
from antefix.bank.entry import NAME
from antefix.bank.folder import Bank
from antefix.errors import BankError, PrefixFileError, one_line
from antefix.prefix import CARD_FILE, MOST_CARD_BYTES, Prefix, read_card_file
from antefix.tensor_file import MOST_BYTES, TENSORS_FILE

_BLOCK = tarfile.BLOCKSIZE
_MOST = {CARD_FILE: MOST_CARD_BYTES, TENSORS_FILE: MOST_BYTES}
Watch = Callable[[int, int], None]
"""Told how many of how many prefixes are done."""


class Packed(NamedTuple):
    """A file of an archive."""

    offset: int
    num_bytes: int


def pack(bank: Bank, archive: str | Path, names: Iterable[str] | None = None, watch: Watch | None = None) -> list[str]:
    """Write prefixes (None: all) into an archive, atomically; their names. Equal prefixes make equal archives.

    Raises BankError for a missing name, an archive that exists, or one that cannot be written, and PrefixFileError for
    a prefix whose bytes are not those that were kept.
    """
    path = Path(archive)
    chosen = list(bank) if names is None else list(dict.fromkeys(names))
    if not chosen:
        raise BankError(f"the bank '{bank.folder}' has no prefix to pack")
    if os.path.lexists(path):
        raise BankError(f"{path} exists: give the archive another name")
    try:
        with atomic.new_file(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for done, name in enumerate(chosen):
                if watch is not None:
                    watch(done, len(chosen))
                bank.read(name, lambda folder, name=name: _add(tar, name, folder))  # type: ignore[misc]
    except OSError as error:
        raise BankError(f"{path} could not be written ({error.strerror or error}); nothing was kept of it") from error
    return chosen


def unpack(
    archive: str | Path, bank: Bank, *, skip_taken: bool = False, watch: Watch | None = None
) -> tuple[list[str], list[str]]:
    """Take an archive's prefixes into a bank: the names that came, and those that were taken already.

    All of them are written and checked before the first gets its name; then they appear one after the other, each
    whole. Raises BankError for a file that is no such archive, for taken names (unless `skip_taken`; all of them are
    told), and where the bank cannot be written; PrefixFileError for a prefix in it that is broken. Nothing is changed
    then.
    """
    path = Path(archive)
    try:
        with path.open("rb") as file:
            packed = _contents(path, file)
            taken = [name for name in packed if os.path.lexists(bank.path(name))]
            if taken and not skip_taken:
                raise BankError(_taken(taken, bank))
            left_alone = set(taken)
            chosen = [name for name in packed if name not in left_alone]
            if chosen:
                bank.folder.mkdir(parents=True, exist_ok=True)
                with atomic.scratch_folder(bank.folder / "unpacked") as scratch:
                    for done, name in enumerate(chosen):
                        if watch is not None:
                            watch(done, len(chosen))
                        _extract(file, packed[name], scratch / name)
                        _check(scratch / name, path)
                    os.sync()  # once for all, not twice for each
                    _place(scratch, bank, chosen)
    except OSError as error:
        raise BankError(f"{path} could not be unpacked ({error.strerror or error}); nothing was changed") from error
    return chosen, taken


def _add(tar: tarfile.TarFile, name: str, folder: Path) -> None:
    """Both files through open handles, and the tensors checked: what is packed belongs together."""
    card, sha256 = (folder / CARD_FILE).read_bytes(), read_card_file(folder)[1]
    with (folder / TENSORS_FILE).open("rb") as tensors:
        if file_digest(tensors, "sha256").hexdigest() != sha256 or (folder / CARD_FILE).read_bytes() != card:
            raise PrefixFileError(f"{folder / TENSORS_FILE}: not the bytes that were kept; fetch it again")
        for file_name, num_bytes in ((CARD_FILE, len(card)), (TENSORS_FILE, tensors.tell())):
            member = tarfile.TarInfo(f"{name}/{file_name}")
            member.size = num_bytes
            if num_bytes >= MOST_BYTES:
                raise BankError(f"'{name}' has {num_bytes:,} bytes, more than an archive can hold in one file")
            member.mode = 0o644
            if file_name == CARD_FILE:
                tar.addfile(member, BytesIO(card))
            else:
                tensors.seek(0)
                tar.addfile(member, tensors)


def _contents(path: Path, file: BinaryIO) -> dict[str, dict[str, Packed]]:
    """Name -> file name -> where it is. Nothing but headers is read. Raises BankError."""
    num_bytes = file.seek(0, os.SEEK_END)
    found: dict[str, dict[str, Packed]] = {}
    place = 0
    while True:
        file.seek(place)
        block = file.read(_BLOCK)
        if block == bytes(_BLOCK):
            break
        name, file_name, size = _member(path, block)
        packed = Packed(place + _BLOCK, size)
        place = packed.offset + -(-size // _BLOCK) * _BLOCK
        if place > num_bytes:
            raise BankError(f"{path}: cut off within '{name}/{file_name}'; fetch it again")
        files = found.setdefault(name, {})
        if file_name in files:
            raise BankError(f"{path}: holds '{name}/{file_name}' twice")
        files[file_name] = packed
    if not found:
        raise BankError(f"{path}: holds no prefix")
    for name, files in found.items():
        if missing := _MOST.keys() - files.keys():
            raise BankError(f"{path}: '{name}' has no {min(missing)}")
    return found


def _member(path: Path, block: bytes) -> tuple[str, str, int]:
    """Name, file name and bytes of a member. Raises BankError for what has no place in a bank's archive."""
    if len(block) < _BLOCK:
        raise BankError(f"{path}: cut off; fetch it again")
    try:
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.TarError as error:
        hint = " (compressed ones are not read)" if block[:2] in (b"\x1f\x8b", b"BZ", b"PK", b"\xfd7") else ""
        raise BankError(f"{path}: no archive of `antefix bank pack`{hint}") from error
    name, _, file_name = member.name.rpartition("/")
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise BankError(f"{path}: '{one_line(member.name, 60)}' is no regular file, and nothing else is unpacked")
    if not NAME.fullmatch(name) or file_name not in _MOST:
        raise BankError(
            f"{path}: '{one_line(member.name, 60)}' is not NAME/{CARD_FILE} or NAME/{TENSORS_FILE}, "
            "and nothing else is unpacked"
        )
    if not 0 <= member.size <= _MOST[file_name]:
        raise BankError(f"{path}: '{name}/{file_name}' has {member.size:,} bytes, allowed are {_MOST[file_name]:,}")
    return name, file_name, member.size


def _extract(file: BinaryIO, files: dict[str, Packed], folder: Path) -> None:
    folder.mkdir()
    for file_name, packed in files.items():
        file.seek(packed.offset)
        with (folder / file_name).open("xb") as target:
            left = packed.num_bytes
            while left:
                chunk = file.read(min(left, 1 << 20))
                if not chunk:
                    raise OSError("the archive ends early")
                target.write(chunk)
                left -= len(chunk)


def _check(folder: Path, archive: Path) -> None:
    try:
        Prefix.load(folder)
    except PrefixFileError as error:
        said = str(error).replace(f"{folder.parent}{os.sep}", "")
        raise PrefixFileError(f"{archive}: {said}") from error


def _place(scratch: Path, bank: Bank, names: Sequence[str]) -> None:
    """Give all of them their names; if one is taken by now, take all back."""
    placed: list[str] = []
    try:
        for name in names:
            bank.refuse_taken(name)
            os.rename(scratch / name, bank.path(name))
            placed.append(name)
    except (OSError, BankError):
        for name in placed:
            os.rename(bank.path(name), scratch / name)
        raise


def _taken(taken: list[str], bank: Bank) -> str:
    shown = ", ".join(f"'{name}'" for name in taken[:10])
    more = f" and {len(taken) - 10:,} more" if len(taken) > 10 else ""
    are = "is" if len(taken) == 1 else "are"
    return f"{shown}{more} {are} taken in the bank '{bank.folder}': rename or remove what is there, or skip taken names"
