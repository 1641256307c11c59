"""A file of generated texts that an interruption cannot harm.

While texts are written, `NAME.partial` grows line by line, in the order in which they are done; its first line
tells this work from any other, so that the same command goes on where it stopped. When all are there, the file
itself appears, in the order of the sources: `.jsonl` with an index, a place and a text a line, any other name
with one text a line (the hypothesis format of the E2E scorer).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from antefix import atomic
from antefix.errors import GenerationError


class GeneratedFile:
    """One file of texts. `task` is everything that decides the texts: sources, prefix, format, decoding."""

    def __init__(self, path: Path, task: Iterable[str], *, overwrite: bool = False) -> None:
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self._digest = hashlib.sha256("\n".join(task).encode()).hexdigest()[:16]
        if path.exists() and not overwrite:
            raise GenerationError(f"{path} exists: choose another name, or say --overwrite")
        self.texts = self._read_partial()
        """Index of a source -> its text, as far as it is done."""

    def add(self, index: int, text: str) -> None:
        """Note one finished text, at once. Raises GenerationError when it cannot be written."""
        try:
            if not self.texts:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.partial.write_text(json.dumps({"task": self._digest}) + "\n", encoding="utf-8")
            with self.partial.open("a", encoding="utf-8") as file:
                file.write(json.dumps([index, text], ensure_ascii=False) + "\n")
        except OSError as error:
            raise GenerationError(f"{self.partial}: cannot be written ({error.strerror or error})") from error
        self.texts[index] = text

    def finish(self, places: Sequence[str]) -> None:
        """Write the file itself; places: where each source came from. Raises GenerationError."""
        if self.path.suffix == ".jsonl":
            rows = ({"index": n, "where": where, "text": self.texts[n]} for n, where in enumerate(places))
            lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        else:
            lines = [" ".join(self.texts[n].split()) for n in range(len(places))]
        try:
            atomic.write_bytes(self.path, "".join(line + "\n" for line in lines).encode())
        except OSError as error:
            raise GenerationError(f"{self.path}: cannot be written ({error.strerror or error})") from error
        self.partial.unlink(missing_ok=True)

    def _read_partial(self) -> dict[int, str]:
        if not self.partial.is_file():
            return {}
        lines = self.partial.read_text(encoding="utf-8", errors="replace").split("\n")
        try:
            task = json.loads(lines[0])["task"] if lines else None
        except (ValueError, KeyError, TypeError):
            task = None
        if task != self._digest:
            raise GenerationError(
                f"{self.partial} belongs to other sources, another prefix or other options: finish that, or remove it"
            )
        done: dict[int, str] = {}
        for line in lines[1:-1]:  # what no line end follows was cut short
            try:
                index, text = json.loads(line)
            except ValueError:
                break  # cut short by the interruption
            done[index] = text
        self._rewrite(done)
        return done

    def _rewrite(self, done: dict[int, str]) -> None:
        rows = [json.dumps({"task": self._digest}), *(json.dumps(r, ensure_ascii=False) for r in done.items())]
        try:
            atomic.write_bytes(self.partial, "".join(row + "\n" for row in rows).encode())
        except OSError as error:
            raise GenerationError(f"{self.partial}: cannot be written ({error.strerror or error})") from error
