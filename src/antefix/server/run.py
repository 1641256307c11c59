"""Starts an engine and a server over it, and ends both: on a signal, or when the engine will serve nothing any more."""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from antefix.bank import Bank
from antefix.base import context_length, load_tokenizer
from antefix.errors import ServerError, ServingError
from antefix.server.app import make_app
from antefix.server.engine import Engine, EngineSettings, start_engine
from antefix.server.keys import Keys
from antefix.server.limits import Admission
from antefix.server.models import Models
from antefix.server.serving import Rules, Serving
from antefix.server.tokens import Tokens

_log = logging.getLogger(__name__)
_LOOK_EVERY_S = 0.5
_TO_SAY_SO_S = 5
"""Seconds for replies to requests whose time is up."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a server listens, under which name, and for whom."""

    host: str
    port: int
    """0: any that is free."""
    base_id: str
    keys_file: Path | None


def serve(place: Place, engine: EngineSettings, rules: Rules, on_ready: Callable[[str, int], None]) -> None:
    """Serve until SIGINT or SIGTERM. on_ready: told the address and the number of prefixes.

    Raises ServerError (port, keys), BankError, BaseModelError; ServingError for an engine that cannot start, or dies.
    """
    keys = None if place.keys_file is None else Keys.read(place.keys_file)
    bank = Bank(engine.bank)
    num_prefixes = len(bank)  # and whether there is one
    listening = _listen(place)  # before the base is read, which takes long
    tokenizer, config = load_tokenizer(engine.base)
    tokens = Tokens(tokenizer, context_length(config), int(config.get_text_config().vocab_size))

    async def run() -> None:
        running = await start_engine(engine)
        serving = Serving(
            engine=running, tokens=tokens, models=Models(place.base_id, bank), rules=rules, keys=keys,
            admission=Admission(engine.max_waiting, engine.max_rows),
        )  # fmt: skip
        on_ready(_address(listening), num_prefixes)
        await _until_stopped(serving, listening)

    with listening:
        asyncio.run(run())


async def _until_stopped(serving: Serving, listening: socket.socket) -> None:
    config = uvicorn.Config(
        make_app(serving), log_config=None, access_log=False, server_header=False, lifespan="off",
        timeout_graceful_shutdown=math.ceil(serving.rules.grace_s) + _TO_SAY_SO_S, timeout_keep_alive=75,
    )  # fmt: skip
    server = _Server(config, serving)
    watching = asyncio.create_task(_watch(serving.engine, server))
    await server.serve(sockets=[listening])
    watching.cancel()
    await serving.engine.stop(0)
    if server.engine_died:
        raise ServingError("the engine's worker died too often: the server ends (its log says why)", "unavailable")


async def _watch(engine: Engine, server: _Server) -> None:
    while not server.should_exit:
        if engine.status().state == "dead":
            server.engine_died = server.should_exit = True
        await asyncio.sleep(_LOOK_EVERY_S)


class _Server(uvicorn.Server):
    """Stops on a signal, giving open requests their time; another signal takes that time away.

    The engine tells open requests that their time is up, where uvicorn would cut them off. That is left for those
    who do not read what they are told.
    """

    def __init__(self, config: uvicorn.Config, serving: Serving) -> None:
        super().__init__(config)
        self._serving = serving
        self.engine_died = False
        self._stopping: list[asyncio.Future[None]] = []

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn would raise them again at the end; to be stopped is no failure."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def _stop(self) -> None:
        admission, grace_s = self._serving.admission, self._serving.rules.grace_s
        if self._stopping:
            grace_s = 0
            asyncio.get_running_loop().call_later(_TO_SAY_SO_S, self._cut_off)
        else:
            _log.warning(
                "stopping: %d texts are open and have %g s; the same signal again ends them at once",
                admission.open, grace_s,
            )  # fmt: skip
        admission.stopping = self.should_exit = True
        self._stopping.append(asyncio.ensure_future(self._serving.engine.stop(grace_s)))

    def _cut_off(self) -> None:
        self.force_exit = True


def _listen(place: Place) -> socket.socket:
    family = socket.AF_INET6 if ":" in place.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((place.host, place.port))
        listening.listen(2048)
    except OSError as error:
        listening.close()
        raise ServerError(
            f"cannot listen at {place.host}:{place.port} ({error.strerror or error}): choose another --port or --host"
        ) from error
    return listening


def _address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
