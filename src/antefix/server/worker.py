"""The process that owns the base: reads commands from a pipe, runs the loop, sends back what happens.

It ends when the pipe closes (its parent is gone), on SIGTERM, or when told to drain and the last job is done. A
request's error never ends it. Ctrl-C is the parent's to answer: a terminal sends it to both.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import threading
import time
from collections import deque
from multiprocessing.connection import Connection

import psutil
import torch

from antefix.bank import Bank
from antefix.base import load_base
from antefix.errors import AntefixError, ServingError, one_line
from antefix.server.heap import give_back, settle
from antefix.server.logs import to_stderr
from antefix.server.loop import Loop
from antefix.server.messages import (
    Cancel,
    Command,
    Done,
    Drain,
    Failed,
    Job,
    Measured,
    NotStarted,
    Order,
    Ready,
    Report,
    Token,
)
from antefix.server.residency import Residency
from antefix.server.settings import EngineSettings

_MEASURE_EVERY_S = 0.25
_RATE_OVER_S = 5.0
_GIVE_BACK_EVERY_S = 10.0
"""So that what it takes is no share of the time."""
_log = logging.getLogger(__name__)


def run(connection: Connection, settings: EngineSettings) -> None:
    """The process's main function."""
    to_stderr()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, commands), daemon=True).start()
    try:
        worker = _Worker(connection, commands, settings)
    except (AntefixError, OSError, RuntimeError) as error:
        connection.send([NotStarted(str(error) if isinstance(error, AntefixError) else one_line(error))])
        return
    worker.serve()


def _listen(connection: Connection, commands: queue.SimpleQueue[Command]) -> None:
    """Hands on what comes, also while the loop computes; without a parent there is nobody left to work for."""
    while True:
        try:
            commands.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


class _Worker:
    def __init__(self, connection: Connection, commands: queue.SimpleQueue[Command], settings: EngineSettings) -> None:
        """Raises AntefixError where base or bank cannot be had."""
        if settings.num_threads is not None:
            torch.set_num_threads(settings.num_threads)
        base = load_base(settings.base, dtype=settings.dtype, device=settings.device)
        self._residency = Residency(base, Bank(settings.bank), settings.resident_bytes)
        self._loop = Loop(
            base, self._residency, max_rows=settings.max_rows, prompt_tokens=settings.prompt_tokens,
            cache_bytes=settings.cache_bytes or _free_bytes(base.model.device) // 2,
        )  # fmt: skip
        self._connection, self._commands = connection, commands
        self._pace = _Pace()
        self._measured_at = 0.0
        self._gave_back_at = time.monotonic()
        self._told_changes: object = None
        self._drains = False
        settle()

    def serve(self) -> None:
        """Until there is nothing to serve any more."""
        self._send([Ready(), self._measured()])
        while not (self._drains and self._loop.is_idle):
            reports = self._obey_all()
            if not self._loop.is_idle:
                reports += self._step()
            if time.monotonic() - self._measured_at > _MEASURE_EVERY_S:
                reports.append(self._measured())
            self._send(reports)
            if time.monotonic() - self._gave_back_at > _GIVE_BACK_EVERY_S:
                give_back()
                self._gave_back_at = time.monotonic()

    def _obey_all(self) -> list[Report]:
        """What came meanwhile; where there is nothing to do, wait for something."""
        reports: list[Report] = []
        while True:
            try:
                wait_s = _MEASURE_EVERY_S if self._loop.is_idle and not reports and not self._drains else 0.0
                command = self._commands.get(timeout=wait_s) if wait_s else self._commands.get_nowait()
            except queue.Empty:
                return reports
            reports += self._obey(command)

    def _obey(self, command: Command) -> list[Report]:
        if isinstance(command, Job):
            self._loop.add(command)
            return []
        if isinstance(command, Cancel):
            return list(self._loop.cancel(command.job))
        if isinstance(command, Drain):
            self._drains = True
            return []
        return [self._carried_out(command), self._measured()]

    def _carried_out(self, order: Order) -> Done:
        try:
            do = {
                "load": self._residency.load,
                "unload": self._residency.unload,
                "pin": self._residency.pin,
            }[order.action]
            do(order.name)
        except ServingError as error:
            return Done(order.request, Failed("", str(error), error.kind))
        except Exception as error:
            _log.exception("an order could not be carried out")
            return Done(order.request, Failed("", f"{type(error).__name__}: {one_line(error)}", "internal"))
        return Done(order.request, None)

    def _step(self) -> list[Report]:
        events = self._loop.step()
        self._pace.count(sum(isinstance(event, Token) for event in events))
        return list(events)

    def _measured(self) -> Measured:
        self._measured_at = time.monotonic()
        residency = self._residency
        known = (residency.num_changes, residency.num_at_work)
        resident = None if known == self._told_changes else residency.resident()
        self._told_changes = known
        return Measured(
            waiting=self._loop.num_waiting, running=self._loop.num_running, tokens_per_s=self._pace.tokens_per_s(),
            resident_bytes=residency.num_bytes, resident=resident,
        )  # fmt: skip

    def _send(self, reports: list[Report]) -> None:
        if not reports:
            return
        try:
            self._connection.send(reports)
        except OSError:
            os._exit(0)  # the parent is gone


class _Pace:
    """Tokens written over the last seconds."""

    def __init__(self) -> None:
        self._lately: deque[tuple[float, int]] = deque()

    def count(self, num_tokens: int) -> None:
        if num_tokens:
            self._lately.append((time.monotonic(), num_tokens))
        self._forget()

    def tokens_per_s(self) -> float:
        self._forget()
        return sum(count for _, count in self._lately) / _RATE_OVER_S

    def _forget(self) -> None:
        before = time.monotonic() - _RATE_OVER_S
        while self._lately and self._lately[0][0] < before:
            self._lately.popleft()
