"""From an engine's events to pieces of text: one job at a time, and several side by side.

Knows engines, tokens and stop strings; nothing of HTTP, nor of how a client wants its pieces written.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from antefix.server.messages import Failed, Finished, Job, PromptScored, Token, Top
from antefix.server.refusal import Refusal
from antefix.server.text import StopStrings, Stripped, TextStream

if TYPE_CHECKING:
    from antefix.server.engine import Engine
    from antefix.server.replies import Reason
    from antefix.server.tokens import Tokens

_STATUS = {
    "not_found": (404, "model_not_found"),
    "broken_prefix": (400, "broken_prefix"),
    "unsupported": (400, "unsupported"),
    "too_long": (400, "context_length_exceeded"),
    "overloaded": (429, "overloaded"),
    "unavailable": (503, "unavailable"),
    "internal": (500, "internal_error"),
}
"""For each kind of failure of an engine what a client is told."""
_RETRY_AFTER_S = 2


def refusal_of(message: str, kind: str) -> Refusal:
    """What a client is told of an engine's failure."""
    status, code = _STATUS[kind]
    return Refusal(status, message, code=code, retry_after=_RETRY_AFTER_S if status in (429, 503) else None)


@dataclass(frozen=True, slots=True)
class Scored:
    """A token of the text and its log-probability."""

    id: int
    logprob: float | None
    top: Top
    offset: int
    """Where in the text it begins, in characters."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new of one choice."""

    index: int
    text: str = ""
    scored: tuple[Scored, ...] = ()
    """Of the tokens whose text begins in what is shown by now, if scores were asked for."""
    reason: Reason | None = None
    """Why the text ends here; None: it goes on."""


class Choice:
    """One job and the text that it becomes. After its pieces: how many tokens were written, with how many slots.

    strip: without the spaces around the text. num_slots: what the cards say, for a text that a stop string ends, whose
    engine is not heard to its end.
    """

    def __init__(
        self, index: int, job: Job, tokens: Tokens, *, stops: Sequence[str], echo: bool, strip: bool, num_slots: int
    ) -> None:
        self.index = index
        self.job = job
        self.num_tokens = 0
        self.num_slots = num_slots
        self._scores = job.sampling.logprobs is not None
        self._echo = echo
        self._text = TextStream(tokens.decode, () if echo else job.prompt)
        self._stops = StopStrings(stops)
        self._strip = Stripped().push if strip else str
        self._waiting: list[Scored] = []
        self._shown = 0

    async def pieces(self, engine: Engine) -> AsyncGenerator[Piece]:
        """The pieces as they come, the last one with its reason. Raises Refusal where the engine fails.

        Whoever closes this iterator before its end cancels the job.
        """
        echo_alone = self._echo and not self.job.sampling.prompt_logprobs
        async with aclosing(engine.stream(self.job)) as events:
            async for event in events:
                if echo_alone and not isinstance(event, Failed):  # a job that is refused has shown nothing
                    echo_alone = False
                    yield self._prompt(None)
                if isinstance(event, PromptScored):
                    yield self._prompt(event)
                elif isinstance(event, Token):
                    yield self._token(event)
                    if self._stops.found:
                        return
                elif isinstance(event, Finished):
                    self.num_slots = event.num_slots
                    if event.reason == "cancelled":
                        raise refusal_of("the text was cancelled", "unavailable")
                    yield self._end(event.reason)
                elif isinstance(event, Failed):
                    raise refusal_of(event.message, event.kind)

    def _prompt(self, scored: PromptScored | None) -> Piece:
        """The prompt as the text's beginning; its stop strings stop nothing."""
        text = ""
        for place, token_id in enumerate(self.job.prompt):
            if scored is not None:
                self._waiting.append(Scored(token_id, scored.logprobs[place], scored.top[place], self._text.num_chars))
            text += self._text.push(token_id)
        text += self._text.flush()
        return self._piece(text)

    def _token(self, token: Token) -> Piece:
        self.num_tokens += 1
        if self._scores:
            self._waiting.append(Scored(token.id, token.logprob, token.top, self._text.num_chars))
        shown = self._stops.push(self._text.push(token.id))
        return self._piece(shown, "stop" if self._stops.found else None)

    def _end(self, reason: Reason) -> Piece:
        shown = self._stops.push(self._text.flush())
        if self._stops.found:
            return self._piece(shown, "stop")
        shown += self._stops.flush()
        return self._piece(shown, reason)

    def _piece(self, text: str, reason: Reason | None = None) -> Piece:
        self._shown += len(text)
        # A token that writes nothing yet (part of a character) stands where the next character will.
        last = self._shown if reason is None or self._stops.found else self._shown + 1
        scored = tuple(one for one in self._waiting if one.offset < last)
        self._waiting = self._waiting[len(scored) :]
        return Piece(self.index, self._strip(text), scored, reason)


async def together(choices: Sequence[Choice], engine: Engine) -> AsyncGenerator[Piece]:
    """The pieces of several choices as they come. Raises Refusal when one fails; the others are cancelled then.

    Whoever closes this iterator before its end cancels all jobs.
    """
    if len(choices) == 1:
        async with aclosing(choices[0].pieces(engine)) as pieces:
            async for piece in pieces:
                yield piece
        return
    found: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()

    async def drive(choice: Choice) -> None:
        try:
            async for piece in choice.pieces(engine):
                found.put_nowait(piece)
        except Exception as error:
            found.put_nowait(error)
        else:
            found.put_nowait(None)

    tasks = [asyncio.create_task(drive(choice)) for choice in choices]
    try:
        left = len(tasks)
        while left:
            new = await found.get()
            if new is None:
                left -= 1
            elif isinstance(new, Exception):
                raise new
            else:
                yield new
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
