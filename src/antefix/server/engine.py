"""The one module of the server that knows who writes the tokens: an `Engine`, and how the usual one is started."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from antefix.base import Dtype
from antefix.server.messages import Event, Job, Resident

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
    alone."""
    resident_bytes: int = 1 << 30
    """Memory for prefixes; what was used longest ago goes first."""
    num_threads: int | None = None
    """Of torch; None: as torch chooses."""
    max_restarts: int = 5
    """Of a worker that died, in a row; one that served for a minute starts the count anew."""


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
    num_tokens: int
    resident_bytes: int
    max_resident_bytes: int
    num_restarts: int

    @property
    def batch_fill(self) -> float:
        """Rows at work of those there are, 0 to 1."""
        return self.running / self.max_rows


class Engine(Protocol):
    """Who writes the tokens. All methods are for one event loop."""

    def stream(self, job: Job) -> AsyncIterator[Event]:
        """The job's events; the last one is Finished or Failed.

        Closing the iterator, or cancelling the task that iterates, cancels the job and frees its row.
        """
        ...

    async def load(self, name: str) -> None:
        """Read a prefix into memory. Raises ServingError, with its kind."""
        ...

    async def unload(self, name: str) -> None:
        """Forget a prefix (and its pin); jobs that have it go on. Raises ServingError (`not_found`: not resident)."""
        ...

    async def pin(self, name: str) -> None:
        """Read a prefix into memory and keep it there. Raises ServingError."""
        ...

    async def unpin(self, name: str) -> None:
        """Let a prefix be dropped for others again. Raises ServingError (`not_found`: not resident)."""
        ...

    def resident(self) -> tuple[Resident, ...]:
        """The prefixes in memory, the latest used last."""
        ...

    def status(self) -> Status:
        """How it is doing, at most a second old."""
        ...

    @property
    def alive(self) -> bool:
        """Whether it takes jobs now."""
        ...

    async def stop(self, grace_s: float) -> None:
        """Take no more jobs, let the open ones end for so long, then fail them as `unavailable`, and end."""
        ...


async def start_engine(settings: EngineSettings) -> Engine:
    """Start a worker process that serves a base and a bank; returns when it takes jobs.

    Raises ServingError where it cannot start.
    """
    from antefix.server.worker_engine import WorkerEngine

    engine = WorkerEngine(settings)
    await engine.start()
    return engine
