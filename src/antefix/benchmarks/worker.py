"""An arm in a process of its own: built once, it works when its turn comes and is idle in between.

Processes keep arms apart: what one allocates, patches or caches is neither an advantage nor a burden to another, and
its peak memory is its own.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from antefix.errors import AntefixError, BenchmarkError


class Worker:
    """`Worker("antefix.benchmarks.training:OurTraining", {...}).call("work", 3)`.

    Raises BenchmarkError with the arm's own reason where building it or a call fails.
    """

    def __init__(self, arm: str, options: dict[str, Any]) -> None:
        # Imports are done once, in a process that runs nothing; a forked one could not use its threads otherwise.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "transformers", "antefix.benchmarks.peers", "antefix.training.loop"])
        self._connection, other = context.Pipe()
        self._name = arm.rpartition(":")[2]
        self._process = context.Process(target=_serve, args=(other, arm, options, dict(os.environ)), daemon=True)
        self._process.start()
        other.close()
        self._receive()

    def call(self, method: str, *args: Any) -> Any:
        """A method of the arm, in its process."""
        try:
            self._connection.send((method, args))
        except OSError:
            raise self._ended() from None
        return self._receive()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
        self._process.join(timeout=10)
        self._process.kill()

    def _receive(self) -> Any:
        try:
            done, result = self._connection.recv()
        except (EOFError, OSError):
            raise self._ended() from None
        if not done:
            raise BenchmarkError(result)
        return result

    def _ended(self) -> BenchmarkError:
        self._process.join(timeout=10)
        return BenchmarkError(f"the arm {self._name} has ended (code {self._process.exitcode}): was memory short?")


def _serve(connection: Connection, arm: str, options: dict[str, Any], environment: dict[str, str]) -> None:
    os.environ.update(environment)  # the process that this one was forked from knows the one at its own start
    module, _, name = arm.partition(":")
    try:
        built = getattr(import_module(module), name)(**options)
    except Exception as error:  # whatever it is, the parent must hear of it
        connection.send((False, _reason(name, error)))
        return
    connection.send((True, None))
    while True:
        try:
            method, args = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, getattr(built, method)(*args)))
        except Exception as error:
            connection.send((False, _reason(name, error)))


def _reason(arm: str, error: Exception) -> str:
    if isinstance(error, AntefixError):
        return str(error)  # a user's mistake says what to do
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"the arm {arm}: {type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
