"""A file of JSON lines that grows as work is done, so that an interrupted command goes on with what is there.

The first line says which work it is. Every other line is a finished piece, written at once and whole; a last line
that an interruption cut short is no piece, and is taken away.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class GrowingFile:
    """The pieces of one work."""

    def __init__(self, path: Path, work: object) -> None:
        """work: what tells this work from any other, as JSON."""
        self.path = path
        self._head = {"work": work}

    def read(self) -> list[Any]:
        """The pieces that are there. Raises OtherWorkError, ValueError for what is no such file, and OSError."""
        if not self.path.is_file():
            return []
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        head, *pieces = (json.loads(line) for line in (whole or _line(self._head)).split(b"\n")[:-1])
        if head != self._head or (not whole and not _line(self._head).startswith(content)):
            raise OtherWorkError(self.path)  # nothing of what is not ours is taken away
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        return pieces

    def add(self, piece: object) -> None:
        """One more piece, on the disk when this returns. Raises OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            lines = [piece] if file.tell() else [self._head, piece]
            file.write(b"".join(map(_line, lines)))
            file.flush()
            os.fsync(file.fileno())


def _line(content: object) -> bytes:
    return f"{json.dumps(content, ensure_ascii=False)}\n".encode()


class OtherWorkError(Exception):
    """The file holds pieces of another work."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.path = path
