"""Files and folders that appear whole or not at all: temporary name, fsync, rename.

Scratch names start with a dot, so that nobody takes one for a kept thing; what a killed process leaves behind
under such a name may be deleted. Knows bytes and paths only.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_SCRATCH = re.compile(r"\..+-[0-9a-f]{8}", re.DOTALL)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # Linux: <fcntl.h>, <linux/fs.h>


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically. Raises OSError (disk full, no permission) and leaves what was there."""
    with new_file(path) as file:
        file.write(content)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A scratch file that becomes `path` when the block ends well, and vanishes when it does not. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = _scratch_beside(path)
    try:
        # Made by `open`, not by `tempfile`: a kept file gets the permissions that any other file would get.
        with scratch.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
        _sync(path.parent)
    finally:
        scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A scratch folder that becomes `path` when the block ends well, and vanishes when it does not.

    Raises FileExistsError if `path` exists by then, unless `replace` is given.
    """
    with scratch_folder(path) as scratch:
        yield scratch
        for file in scratch.iterdir():
            _sync(file)
        _sync(scratch)
        if not os.path.lexists(path):
            os.rename(scratch, path)
        elif replace:
            _exchange(scratch, path)  # what was there goes the way of the scratch folder
        else:
            raise FileExistsError(f"{path} exists")
        _sync(path.parent)


@contextlib.contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path`, for the length of a block. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = _scratch_beside(path)
    scratch.mkdir()
    try:
        yield scratch
    finally:
        _delete(scratch)


def remove_folder(path: Path) -> None:
    """Take a folder away: its name is free at once, then its content is deleted.

    A link is removed, never what it points to. Raises OSError and leaves what was there.
    """
    scratch = _scratch_beside(path)
    os.rename(path, scratch)
    _sync(path.parent)
    _delete(scratch)


def leftovers(folder: Path, before: float) -> list[Path]:
    """What killed processes left behind here, if nothing in it changed since `before` (seconds, as `time.time`).

    Raises OSError.
    """
    return sorted(p for p in folder.iterdir() if _SCRATCH.fullmatch(p.name) and _last_change(p) < before)


def delete(path: Path) -> bool:
    """Delete a file or a folder with what is in it; of a link, the link. Whether it is gone."""
    with contextlib.suppress(OSError):
        _delete(path)
    return not os.path.lexists(path)


def _last_change(path: Path) -> float:
    every = [path, *(Path(root) / name for root, folders, files in os.walk(path) for name in (*folders, *files))]
    times = []
    for one in every:
        with contextlib.suppress(FileNotFoundError):  # whoever made it is at work
            status = one.lstat()
            times.append(max(status.st_mtime, status.st_ctime))
    return max(times, default=math.inf)


def _scratch_beside(path: Path) -> Path:
    return path.parent / f".{path.name}-{secrets.token_hex(4)}"


def _exchange(new: Path, old: Path) -> None:
    """Swap two names: in one step where the system can (Linux), else in two, undone if the second fails."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if rename and rename(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE) == 0:
        return
    aside = _scratch_beside(old)
    os.rename(old, aside)
    try:
        os.rename(new, old)
    except OSError:
        os.rename(aside, old)
        raise
    os.rename(aside, new)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
