"""What a server takes on: bytes of a request, and jobs that wait or run. What is too much is refused at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from antefix.server.refusal import Refusal

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_LONGEST_WAIT_S = 30
_DROPPED = 8
"""So many times the limit is read of a request that is too long."""


class Admission:
    """Counts jobs that are open: those that wait and those that run."""

    def __init__(self, max_waiting: int, max_rows: int) -> None:
        self.max_open = max_waiting + max_rows
        self.open = 0
        self.stopping = False
        self._max_rows = max_rows

    @contextmanager
    def enter(self, num_jobs: int) -> Iterator[None]:
        """Room for so many jobs while this lasts. Raises Refusal: 429 where there is none, 503 while stopping."""
        if self.stopping:
            raise Refusal(503, "the server is being stopped", code="stopping", retry_after=_LONGEST_WAIT_S)
        if num_jobs > self.max_open:
            raise Refusal(400, f"{num_jobs} texts in one request, the most this server takes is {self.max_open}")
        if self.open + num_jobs > self.max_open:
            raise Refusal(
                429,
                f"the queue is full ({self.open} of {self.max_open} texts): ask again later",
                code="queue_full",
                retry_after=self.retry_after,
            )
        self.open += num_jobs
        try:
            yield
        finally:
            self.open -= num_jobs

    @property
    def retry_after(self) -> int:
        """Seconds after which there may be room: about one for every batch that waits."""
        return min(1 + self.open // self._max_rows, _LONGEST_WAIT_S)


class BodyLimit:
    """Refuses requests of more bytes than this with 413; never keeps more of one."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._max_bytes:
            await self._refuse(receive, send)
            return
        read = 0
        started = False

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._max_bytes:
                raise _TooLong
            return message

        async def noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, counted, noted)
        except _TooLong:
            if not started:
                await self._refuse(receive, send)

    async def _refuse(self, receive: Receive, send: Send) -> None:
        # Who is cut off while sending does not hear why, so the rest is read and dropped, within reason.
        left = _DROPPED * self._max_bytes
        while left > 0:
            message = await receive()
            left -= len(message.get("body", b""))
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                break
        refusal = Refusal(413, f"the request has more than {self._max_bytes:,} bytes", code="request_too_large")
        await refusal.reply(send, (b"connection", b"close"))


class _TooLong(BaseException):
    """Not an Exception: whoever reads a body turns those into a reply of its own."""
