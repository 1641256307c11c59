"""How fast work goes and how long the rest takes."""

from __future__ import annotations

import time


class Pace:
    """Counts equal pieces of work since it was made."""

    def __init__(self, total: int) -> None:
        self._total, self._started = total, time.monotonic()
        self.done = 0
        """Pieces done so far."""

    def one_done(self) -> None:
        """Another piece is done."""
        self.done += 1

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    @property
    def per_second(self) -> float:
        """Pieces a second."""
        return self.done / max(self.seconds, 1e-9)

    @property
    def seconds_left(self) -> float:
        """At the pace so far."""
        return (self._total - self.done) / max(self.per_second, 1e-9)
