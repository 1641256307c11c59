"""What an engine is started with, and how it says it is doing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from antefix.base import Dtype

State = Literal["running", "restarting", "stopping", "dead"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What an engine is started with."""

    base: str
    """As `antefix.load_base` takes it."""
    bank: Path
    """The folder of prefixes."""
    dtype: Dtype = "float32"
    device: str = "cpu"
    max_rows: int = 16
    """Jobs that write at the same time."""
    max_waiting: int = 256
    """Jobs that wait for a row; more are refused as `overloaded`."""
    prompt_tokens: int = 512
    """Of joining jobs, padding included, that are read between two tokens of the running ones; a longer prompt is read
    alone, in pieces."""
    cache_bytes: int | None = None
    """Memory for keys and values of the texts at work; who does not fit in waits. A text that is alone always fits.
    None: half of what is free when the base has been loaded."""
    resident_bytes: int = 1 << 30
    """Memory for prefixes; what was used longest ago goes first."""
    num_threads: int | None = None
    """Of torch; None: as torch chooses."""
    max_restarts: int = 5
    """Of a worker that died, in a row; one that served for a minute starts the count anew."""
    silent_s: float = 120.0
    """A worker says how it is doing between two tokens; one that says nothing for so long hangs, and is ended."""


@dataclass(frozen=True, slots=True)
class Status:
    """How an engine is doing."""

    state: State
    """`dead`: it will serve nothing any more."""
    alive: bool
    """Whether it takes jobs now."""
    waiting: int
    running: int
    max_rows: int
    tokens_per_s: float
    resident_bytes: int
    num_restarts: int

    @property
    def batch_fill(self) -> float:
        """Rows at work of those there are, 0 to 1."""
        return self.running / self.max_rows
