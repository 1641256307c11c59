"""An engine whose loop runs in a process of its own: the side of the app.

Two threads serve a worker's pipe, one a direction, so that the app's event loop never waits for it. A pipe that closes
is a worker that died: every open stream fails at once, and another worker is started, a few times with growing pauses.
One that says nothing any more is ended first.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import multiprocessing
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from antefix.errors import ServingError
from antefix.server import worker
from antefix.server.messages import (
    Action,
    Cancel,
    Command,
    Done,
    Drain,
    Event,
    Failed,
    Finished,
    Job,
    Measured,
    NotStarted,
    Order,
    Ready,
    Report,
    Resident,
)
from antefix.server.settings import EngineSettings, State, Status

_FIRST_PAUSE_S = 0.25
_SETTLED_S = 60.0
"""A worker that lived this long was in order: the count of restarts begins anew."""
_DIED = "the engine's worker died while it worked on this; ask again"
_DIED_EARLY = "the engine's worker died while it started; its log says why"
_STOPPED = "the server is stopping"
_log = logging.getLogger(__name__)


class WorkerEngine:
    """See `antefix.server.engine.Engine`."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._state: State = "restarting"
        self._pipe: _Pipe | None = None
        self._streams: dict[str, asyncio.Queue[Event]] = {}
        self._orders: dict[int, asyncio.Future[Done]] = {}
        self._numbers = itertools.count()
        self._pinned: set[str] = set()
        self._resident: tuple[Resident, ...] = ()
        self._measured: Measured | None = None
        self._heard_at = 0.0
        self._num_restarts = 0
        self._in_a_row = 0
        self._ready = asyncio.Event()
        self._gone = asyncio.Event()
        self._refusal: str | None = None
        self._keeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the worker; returns when it takes jobs. Raises ServingError where it cannot."""
        self._spawn()
        try:
            await self._until_ready_or_gone()
        except asyncio.CancelledError:
            self._kill()
            raise
        if not self._ready.is_set():
            self._state = "dead"
            self._kill()
            raise ServingError(self._refusal or _DIED_EARLY, "internal")
        self._keeper = asyncio.create_task(self._keep_alive())

    async def stream(self, job: Job) -> AsyncGenerator[Event]:
        """The job's events."""
        if job.id in self._streams:
            raise ValueError(f"a job '{job.id}' is open")
        if refused := self._refused(job):
            yield refused
            return
        events: asyncio.Queue[Event] = asyncio.Queue()
        self._streams[job.id] = events
        self._send(job)
        is_over = False
        try:
            while not is_over:
                event = await events.get()
                is_over = isinstance(event, Finished | Failed)
                yield event
        finally:
            self._streams.pop(job.id, None)
            if not is_over:
                self._send(Cancel(job.id))

    async def load(self, name: str) -> None:
        """Read a prefix into memory."""
        await self._order("load", name)

    async def unload(self, name: str) -> None:
        """Forget a prefix and its pin."""
        await self._order("unload", name)
        self._pinned.discard(name)

    async def pin(self, name: str) -> None:
        """Read a prefix into memory and keep it there, also after a restart."""
        await self._order("pin", name)
        self._pinned.add(name)

    def resident(self) -> tuple[Resident, ...]:
        """The prefixes in memory."""
        return self._resident if self.alive else ()

    def status(self) -> Status:
        """How it is doing."""
        said = self._measured if self.alive else None
        return Status(
            state=self._state, alive=self.alive,
            waiting=said.waiting if said else 0, running=said.running if said else 0,
            max_rows=self._settings.max_rows, tokens_per_s=said.tokens_per_s if said else 0.0,
            resident_bytes=said.resident_bytes if said else 0, num_restarts=self._num_restarts,
        )  # fmt: skip

    @property
    def alive(self) -> bool:
        """Whether it takes jobs now."""
        return self._state == "running"

    @property
    def worker_pid(self) -> int | None:
        """Of the worker's process; None between two of them."""
        return None if self._pipe is None else self._pipe.process.pid

    async def stop(self, grace_s: float) -> None:
        """Let the open jobs end for so long, then fail them, and end."""
        if self._state == "running":
            self._state = "stopping"
            self._send(Drain())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self._gone.wait()
        self._state = "dead"
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        await asyncio.to_thread(self._kill)
        self._fail_all(_STOPPED)

    # --- the worker's life ----------------------------------------------------------------------------------

    async def _keep_alive(self) -> None:
        """Start another worker whenever one dies, until too many did in a row."""
        while True:
            began = time.monotonic()
            await self._until_gone_or_silent()
            self._fail_all(_STOPPED if self._state == "stopping" else _DIED)
            if self._state == "stopping":
                return
            self._in_a_row = 0 if time.monotonic() - began > _SETTLED_S else self._in_a_row
            self._state = "restarting"
            is_back = False
            while not is_back and self._in_a_row < self._settings.max_restarts:
                is_back = await self._restarted()
            if not is_back:
                _log.error("the engine's worker died %d times in a row: no more is started", self._in_a_row + 1)
                self._state = "dead"
                await asyncio.to_thread(self._kill)
                return

    async def _until_gone_or_silent(self) -> None:
        """In the end it is gone."""
        silent_s = self._settings.silent_s
        while (left_s := self._heard_at + silent_s - time.monotonic()) > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._gone.wait()
                    return
        _log.error("the engine's worker has said nothing for %.0f s: it is ended", silent_s)
        await asyncio.to_thread(self._kill)
        self._gone.set()

    async def _restarted(self) -> bool:
        """Whether another worker takes jobs now."""
        await asyncio.to_thread(self._kill)
        await asyncio.sleep(_FIRST_PAUSE_S * 2**self._in_a_row)
        self._in_a_row += 1
        self._num_restarts += 1
        _log.warning(
            "the engine's worker died: starting it again (%d of %d)", self._in_a_row, self._settings.max_restarts
        )
        try:
            self._spawn()
        except OSError as error:  # no memory for a process, say
            _log.error("the engine's worker could not be started: %s", error)
            return False
        await self._until_ready_or_gone()
        return self._ready.is_set()

    def _spawn(self) -> None:
        self._ready, self._gone = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        pipe = _Pipe(self._settings)

        def tell(reports: list[Report] | None) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop is closed
                loop.call_soon_threadsafe(self._hear, pipe, reports)

        pipe.open(tell)
        self._pipe = pipe

    async def _until_ready_or_gone(self) -> None:
        waits = [asyncio.create_task(event.wait()) for event in (self._ready, self._gone)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def _kill(self) -> None:
        pipe, self._pipe = self._pipe, None
        if pipe is not None:
            pipe.close()

    def _hear(self, pipe: _Pipe, reports: list[Report] | None) -> None:
        """What a worker says; None: its pipe is closed."""
        if pipe is not self._pipe:
            return  # one that is gone already
        self._heard_at = time.monotonic()
        if reports is None:
            self._gone.set()
            return
        for report in reports:
            if isinstance(report, Measured):
                self._measured = report
                self._resident = self._resident if report.resident is None else report.resident
            elif isinstance(report, Ready):
                self._state = "running"
                self._ready.set()
                for name in sorted(self._pinned):
                    self._send(Order(next(self._numbers), "pin", name))
            elif isinstance(report, NotStarted):
                self._refusal = report.message
            elif isinstance(report, Done):
                if (waiting := self._orders.pop(report.request, None)) is not None and not waiting.done():
                    waiting.set_result(report)
            elif (events := self._streams.get(report.job)) is not None:
                events.put_nowait(report)

    # --- what is asked of it --------------------------------------------------------------------------------

    def _refused(self, job: Job) -> Failed | None:
        if self._state != "running":
            message = {"stopping": _STOPPED, "restarting": "the engine's worker died and is being started again"}
            return Failed(job.id, message.get(self._state, "the engine has stopped"), "unavailable")
        most = self._settings.max_rows + self._settings.max_waiting
        if len(self._streams) >= most:
            return Failed(job.id, f"{most} requests are open, which is the most: ask again later", "overloaded")
        return None

    async def _order(self, action: Action, name: str) -> None:
        if self._state != "running":
            raise ServingError("the engine takes no orders now; ask again later", "unavailable")
        order = Order(next(self._numbers), action, name)
        answer: asyncio.Future[Done] = asyncio.get_running_loop().create_future()
        self._orders[order.request] = answer
        self._send(order)
        try:
            problem = (await answer).problem
        finally:
            self._orders.pop(order.request, None)
        if problem is not None:
            raise ServingError(problem.message, problem.kind)

    def _send(self, command: Command) -> None:
        if self._pipe is not None:
            self._pipe.send(command)

    def _fail_all(self, message: str) -> None:
        for job, events in self._streams.items():
            events.put_nowait(Failed(job, message, "unavailable"))
        self._streams.clear()
        for request, waiting in self._orders.items():
            if not waiting.done():
                waiting.set_result(Done(request, Failed("", message, "unavailable")))
        self._orders.clear()


class _Pipe:
    """A worker process and the two threads that serve its pipe."""

    def __init__(self, settings: EngineSettings) -> None:
        context = multiprocessing.get_context("spawn")
        self._here, self._there = context.Pipe()
        self.process: BaseProcess = context.Process(
            target=worker.run, args=(self._there, settings), name="antefix engine", daemon=True
        )
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()

    def open(self, tell: Callable[[list[Report] | None], None]) -> None:
        """Start it. tell: called by a thread with what the worker says, with None when it says nothing any more."""
        self.process.start()
        self._there.close()  # so that the worker's death closes the pipe
        threading.Thread(target=_hear, args=(self._here, tell), daemon=True).start()
        threading.Thread(target=_say, args=(self._here, self._commands), daemon=True).start()

    def send(self, command: Command) -> None:
        """Hand a command on; never waits."""
        self._commands.put(command)

    def close(self) -> None:
        """End the process, whatever it does."""
        self._commands.put(None)
        self.process.terminate()
        self.process.join(2.0)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self._here.close()


def _hear(connection: Connection, tell: Callable[[list[Report] | None], None]) -> None:
    while True:
        try:
            reports = connection.recv()
        except (EOFError, OSError):
            tell(None)
            return
        tell(reports)


def _say(connection: Connection, commands: queue.SimpleQueue[Command | None]) -> None:
    while (command := commands.get()) is not None:
        try:
            connection.send(command)
        except OSError:
            return  # the other thread says that the pipe is closed
