"""A line of JSON for every request: who, what, how long, how much; no texts unless they were asked for."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
import uuid
from typing import TYPE_CHECKING, Any

from antefix.errors import AntefixError
from antefix.server.refusal import Refusal

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from antefix.server.meters import Meters

log = logging.getLogger("antefix.server")

_QUIET = ("/health", "/metrics")
"""Asked every few seconds, by machines: counted, but not worth a line."""


class JsonLines(logging.Formatter):
    """A record as one line of JSON; what it carries as `told` beside the message."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        content: dict[str, Any] = {
            "time": f"{when}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "told", {}),
        }
        if record.exc_info:
            content["traceback"] = self.formatException(record.exc_info)
        return json.dumps(content, ensure_ascii=False, default=str)


def to_stderr() -> None:
    """The server's and uvicorn's own lines to stderr, all of one form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    handler.addFilter(_is_no_cut)
    for name, level in (("antefix.server", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False


def _is_no_cut(record: logging.LogRecord) -> bool:
    """uvicorn tells of a request that the server's end cut off as of a fault; its own line says what it was."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


def failed(told: dict[str, Any], error: Exception) -> Refusal:
    """What a client is told of an error that came while its request was answered; ours goes to the log, whole.

    told: of the request's line in the log.
    """
    if isinstance(error, Refusal):
        refusal = error
    elif isinstance(error, AntefixError):
        refusal = Refusal(400, str(error))
    else:
        log.error("a request failed", exc_info=error, extra={"told": {"request": told["request"]}})
        refusal = Refusal(500, f"this is our fault; the log has more under {told['request']}", code="internal_error")
    note_refusal(told, refusal)
    return refusal


def note_refusal(told: dict[str, Any], refusal: Refusal) -> None:
    """For the request's line in the log: what was told instead of an answer."""
    told["failed"] = {"status": refusal.status, "code": refusal.code, "param": refusal.param, "message": str(refusal)}


class Logged:
    """Counts and times every request, answers one that failed by our fault, and writes its line when all is sent."""

    def __init__(self, app: ASGIApp, meters: Meters, *, log_texts: bool) -> None:
        self._app = app
        self._meters = meters
        self._log_texts = log_texts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        told: dict[str, Any] = {"request": uuid.uuid4().hex[:16]}
        start = time.monotonic()
        scope.setdefault("state", {}).update(told=told, start_s=start)
        status = 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", told["request"].encode())]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except asyncio.CancelledError:
            told["cut_off"] = True
            raise
        except Exception as error:
            if status:  # it is too late to say so
                raise
            await failed(told, error).reply(noted)
        finally:
            seconds = time.monotonic() - start
            route = getattr(scope.get("route"), "path", "(none)")
            self._meters.requests.labels(route, str(status)).inc()
            self._meters.seconds.labels(route).observe(seconds)
            if scope["path"] not in _QUIET:
                refused = told.get("failed")
                if refused is not None and refused["status"] < 500 and not self._log_texts:
                    del refused["message"]  # it quotes what was sent
                line = {"method": scope["method"], "path": scope["path"][:200], "status": status}
                log.info("request", extra={"told": {**line, "ms": round(1000 * seconds, 1), **told}})
