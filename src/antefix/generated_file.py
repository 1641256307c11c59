"""A file of generated texts that an interruption cannot harm.

While texts are written, `NAME.partial` grows in the order in which they are done, so that the same command goes on
where it stopped. When all are there, the file itself appears, in the order of the sources: `.jsonl` with an index, a
place and a text a line, any other name with one text a line (the hypothesis format of the E2E scorer).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from antefix import atomic
from antefix.digest import digest
from antefix.errors import GenerationError
from antefix.growing_file import GrowingFile, OtherWorkError


class GeneratedFile:
    """One file of texts. `task` is everything that decides the texts: sources, prefix, format, decoding."""

    def __init__(self, path: Path, task: Iterable[str], *, overwrite: bool = False) -> None:
        """Raises GenerationError for a file that exists, or that other texts are being written to."""
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self._growing = GrowingFile(self.partial, digest(*task))
        if path.exists() and not overwrite:
            raise GenerationError(f"{path} exists: choose another name, or say --overwrite")
        self.texts = self._read_partial()
        """Index of a source -> its text, as far as it is done."""

    def add(self, index: int, text: str) -> None:
        """Note one finished text, at once. Raises GenerationError when it cannot be written."""
        try:
            self._growing.add([index, text])
        except OSError as error:
            raise GenerationError(f"{self.partial}: cannot be written ({error.strerror or error})") from error
        self.texts[index] = text

    def finish(self, places: Sequence[str], prefixes: Sequence[str | None] | None = None) -> None:
        """Write the file itself. Raises GenerationError.

        places: where each source came from. prefixes: whose text each is, where they differ.
        """
        if self.path.suffix == ".jsonl":
            of_whom = [{}] * len(places) if prefixes is None else [{"prefix": name} for name in prefixes]
            rows = zip(places, of_whom, strict=True)
            lines = [
                json.dumps({"index": n, "where": where, **whose, "text": self.texts[n]}, ensure_ascii=False)
                for n, (where, whose) in enumerate(rows)
            ]
        else:
            lines = [" ".join(self.texts[n].split()) for n in range(len(places))]
        try:
            atomic.write_bytes(self.path, "".join(line + "\n" for line in lines).encode())
        except OSError as error:
            raise GenerationError(f"{self.path}: cannot be written ({error.strerror or error})") from error
        self.partial.unlink(missing_ok=True)

    def _read_partial(self) -> dict[int, str]:
        try:
            return {int(index): str(text) for index, text in self._growing.read()}
        except OtherWorkError as error:
            raise GenerationError(
                f"{self.partial} belongs to other sources, another prefix or other options: finish that, or remove it"
            ) from error
        except (OSError, ValueError, TypeError) as error:
            raise GenerationError(f"{self.partial}: not a file of generated texts ({error}); remove it") from error
