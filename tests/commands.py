"""Processes that start at once: forked from a server that has imported what takes seconds to import.

A process is real: it has its own memory and exit code, takes signals, and dies of them. What a fresh start alone shows
(what is imported when, what a terminal gets) is tested in a fresh interpreter.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing.context import ForkServerContext
from pathlib import Path

IMPORTED = [f"antefix.{name}" for name in ("cli", "demo", "generation", "training.run", "training.many_run")]
"""What the server imports, so that what it forks need not."""


def processes() -> ForkServerContext:
    """Where such processes come from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


class Command:
    """`antefix` with these words in a process of its own, handled as a `subprocess.Popen`."""

    def __init__(self, *words: str | Path, folder: Path | None = None) -> None:
        said = Path(tempfile.mkdtemp(dir=os.environ["HOME"]))
        self._paths = [said / name for name in ("stdout", "stderr")]
        arguments = ([str(word) for word in words], str(folder or Path.cwd()), dict(os.environ), self._paths)
        self._process = processes().Process(target=_run, args=arguments)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        """None while it runs; negative: the signal that it died of."""
        return self._process.exitcode

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise TimeoutError(f"it runs after {timeout} s")
        return self.returncode

    def errors_so_far(self) -> str:
        """What it said on standard error until now."""
        return self._paths[1].read_text(encoding="utf-8") if self._paths[1].exists() else ""

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it said on standard output and standard error, in the end."""
        self.wait(timeout)
        out, err = (path.read_text(encoding="utf-8") for path in self._paths)
        return out, err


def _run(words: list[str], folder: str, environment: Mapping[str, str], said: list[Path]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, path in enumerate(said, start=1):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(n, "wb", closefd=False), write_through=True) for n in (1, 2))
    sys.argv = ["antefix", *words]
    from antefix.cli import main

    main()
