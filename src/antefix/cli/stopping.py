"""How a long command answers Ctrl-C: it ends the step it is in, and loses nothing."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

INTERRUPTED = 130
"""The exit code."""
_STDERR = 2
_STOPPING = b"stopping after this step; the same command goes on from here (Ctrl-C again: stop at once)\n"


@contextmanager
def stop_after_step(message: bytes = _STOPPING, *, speaks: bool = True) -> Iterator[Any]:
    """The first Ctrl-C (or SIGTERM) ends the run after the step it is in, with a checkpoint; the second at once.

    A process that does not speak, since another does, ends with the exit code alone.
    """
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        # Past Python's buffers: they may be in the middle of a progress line, and refuse to be entered twice.
        if speaks:
            os.write(_STDERR, message)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    except KeyboardInterrupt:
        if speaks:
            raise
        sys.exit(INTERRUPTED)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
