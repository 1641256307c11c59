"""How long a call takes, when a machine does other things beside."""

from __future__ import annotations

import time
from collections.abc import Callable


def at_best(call: Callable[[], object], times: int = 3) -> float:
    """The least seconds of the processor that one of some calls took."""

    def seconds() -> float:
        started = time.process_time()
        call()
        return time.process_time() - started

    return min(seconds() for _ in range(times))
