"""From a request's choices to its reply, whole or as a stream of events; a client that went away ends its jobs.

A stream: chunks as `data:` lines, `: ping` comments while there is nothing to say, an `error` object if it fails on the
way, `data: [DONE]` at its end. What fails before the first piece is an ordinary reply with its status.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import ExitStack, aclosing
from typing import TYPE_CHECKING, Any, Protocol

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from antefix.server.logs import failed
from antefix.server.refusal import Refusal
from antefix.server.serving import serving_of, tell
from antefix.server.writing import Piece, together

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from antefix.server.asking import Asking
    from antefix.server.replies import Usage

_CLIENT_GONE = 499
"""For the log only: nobody hears it."""


class Shape(Protocol):
    """How one endpoint writes pieces."""

    def opening(self) -> Sequence[Mapping[str, Any]]:
        """Chunks before the first piece."""
        ...

    def chunks(self, piece: Piece) -> Sequence[Mapping[str, Any]]:
        """A piece as chunks of a stream."""
        ...

    def usage_chunk(self, usage: Usage) -> Mapping[str, Any]:
        """A stream's last chunk, if it was asked for."""
        ...

    def reply(self, pieces: Sequence[Sequence[Piece]], usage: Usage) -> Mapping[str, Any]:
        """All pieces, choice by choice, as one reply."""
        ...


async def answer(request: Request, asking: Asking, shape: Shape, *, stream: bool, with_usage: bool) -> Response:
    """The reply to a request. Raises Refusal for what fails before a stream has begun."""
    serving = serving_of(request)
    tell(request, model=asking.chosen.id, prefixes=list(asking.chosen.prefixes), stream=stream)
    with ExitStack() as until_here:
        until_here.enter_context(serving.admission.enter(len(asking.choices)))
        pieces = _measured(request, asking)
        if not stream:
            reply: Response = await _while_there(request, _whole(asking, pieces, shape))
            return reply
        lines = _lines(request, asking, pieces, shape, with_usage)
        # The first line waits for the first piece, so that what is refused at once has its own status.
        first = await _while_there(request, anext(lines))
        # From here on the room is held until the stream ends, not until this function does.
        return _EventStream(request, first, lines, until_here.pop_all(), _headers(asking))


async def _whole(asking: Asking, pieces: AsyncGenerator[Piece], shape: Shape) -> Response:
    found: list[list[Piece]] = [[] for _ in asking.choices]
    async with aclosing(pieces):
        async for piece in pieces:
            found[piece.index].append(piece)
    return JSONResponse(shape.reply(found, asking.usage()), headers=_headers(asking))


def _headers(asking: Asking) -> dict[str, str]:
    told = {"Cache-Control": "no-store"}
    return told | ({"X-Antefix-Not-Applied": ", ".join(asking.not_applied)} if asking.not_applied else {})


async def _measured(request: Request, asking: Asking) -> AsyncGenerator[Piece]:
    """The pieces, counted and timed."""
    serving = serving_of(request)
    label = serving.meters.label(asking.chosen.prefixes)
    first, texts = True, [""] * len(asking.choices)
    try:
        async with aclosing(together(asking.choices, serving.engine)) as pieces:
            async for piece in pieces:
                if first and (asking.choices[piece.index].num_tokens or piece.reason):
                    first, seconds = False, time.monotonic() - request.state.start_s
                    serving.meters.first_token.labels(label).observe(seconds)
                    tell(request, first_token_ms=round(1000 * seconds, 1))
                if serving.rules.log_texts:
                    texts[piece.index] += piece.text
                yield piece
    finally:
        usage = asking.usage()
        serving.meters.prompt_tokens.labels(label).inc(usage["prompt_tokens"])
        serving.meters.written_tokens.labels(label).inc(usage["completion_tokens"])
        tell(request, prompt_tokens=usage["prompt_tokens"], written_tokens=usage["completion_tokens"])
        if serving.rules.log_texts:
            prompts = dict.fromkeys(choice.job.prompt for choice in asking.choices)
            tell(request, prompts=[serving.tokens.decode(list(ids)) for ids in prompts], texts=texts)


async def _lines(
    request: Request, asking: Asking, pieces: AsyncGenerator[Piece], shape: Shape, with_usage: bool
) -> AsyncGenerator[str]:
    """The lines of a stream. Raises only before the first of them."""
    begun = False
    try:
        async with aclosing(_or_nothing(pieces, serving_of(request).rules.ping_s)) as found:
            async for piece in found:
                for chunk in () if begun else shape.opening():
                    yield _event(chunk)
                begun = True
                if piece is None:
                    yield ": ping\n\n"
                    continue
                for chunk in shape.chunks(piece):
                    yield _event(chunk)
        if with_usage:
            yield _event(shape.usage_chunk(asking.usage()))
    except Exception as error:
        if not begun:
            raise
        yield _event(failed(request.state.told, error).content())
        return
    yield "data: [DONE]\n\n"


def _event(content: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(',', ':'))}\n\n"


async def _or_nothing(pieces: AsyncGenerator[Piece], seconds: float) -> AsyncGenerator[Piece | None]:
    """The pieces, and None whenever none came for so long."""
    async with aclosing(pieces):
        while True:
            coming = asyncio.ensure_future(anext(pieces, None))
            try:
                while not (await asyncio.wait({coming}, timeout=seconds))[0]:
                    yield None
            finally:
                if not coming.done():
                    coming.cancel()
                    await asyncio.wait({coming})
            piece = coming.result()
            if piece is None:
                return
            yield piece


async def _while_there(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """What the work comes to; it is cancelled when the client goes away."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        _tell_gone(request)
        raise Refusal(_CLIENT_GONE, "the client went away")
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.wait({working, gone})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _tell_gone(request: Request) -> None:
    tell(request, client_gone=True)
    serving_of(request).meters.gone.inc()


class _EventStream(Response):
    """Sends lines until they end, or the client is gone or reads no more; then their jobs end, their room is free."""

    media_type = "text/event-stream"

    def __init__(
        self, request: Request, first: str, lines: AsyncIterator[str], room: ExitStack, headers: dict[str, str]
    ) -> None:
        super().__init__(headers={**headers, "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._request = request
        self._first = first
        self._lines = lines
        self._room = room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        with self._room:
            sending = asyncio.ensure_future(self._send(send))
            gone = asyncio.ensure_future(_gone(receive))
            try:
                await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not sending.done():
                    _tell_gone(self._request)
            finally:
                for task in (sending, gone):
                    task.cancel()
                await asyncio.wait({sending, gone})
            if not sending.cancelled() and (error := sending.exception()) is not None:
                raise error

    async def _send(self, send: Send) -> None:
        async def body(content: str, *, more: bool = True) -> None:
            async with asyncio.timeout(serving_of(self._request).rules.unread_s):
                await send({"type": "http.response.body", "body": content.encode(), "more_body": more})

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await body(self._first)
            async with aclosing(self._lines) as lines:  # type: ignore[type-var]
                async for line in lines:
                    await body(line)
            await body("", more=False)
        except TimeoutError:  # a reply without its end: the server closes the connection
            _tell_gone(self._request)
