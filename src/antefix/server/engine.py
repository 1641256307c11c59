"""The one module of the server that knows who writes the tokens: an `Engine`, and how the usual one is started."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from antefix.server.messages import Event, Job, Resident
from antefix.server.settings import EngineSettings, State, Status

__all__ = ["Engine", "EngineSettings", "State", "Status", "start_engine"]


class Engine(Protocol):
    """Who writes the tokens. All methods are for one event loop."""

    def stream(self, job: Job) -> AsyncGenerator[Event]:
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
