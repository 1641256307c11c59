"""`POST /v1/completions`: prompts as they are, in texts or token ids; and the shape of its replies."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from antefix.server import VERSION
from antefix.server.answering import answer
from antefix.server.asking import Asking, Wanted, asking
from antefix.server.keys import Caller
from antefix.server.replies import Completion, CompletionChoice, CompletionLogprobs, Usage
from antefix.server.serving import caller_of, serving_of
from antefix.server.wire import CompletionRequest
from antefix.server.writing import Piece

if TYPE_CHECKING:
    from antefix.server.tokens import Tokens

routes = APIRouter()


@routes.post("/v1/completions", response_model=Completion)
async def complete(
    asked: CompletionRequest, request: Request, caller: Annotated[Caller, Depends(caller_of)]
) -> Response:
    """Go on with a text."""
    serving = serving_of(request)
    chosen = serving.choose(asked, caller)
    wanted = Wanted(max_tokens=asked.max_tokens, logprobs=asked.logprobs, echo=asked.echo)
    prompts = await _prompts(asked, serving.tokens)
    made = asking(serving, asked, chosen, prompts, wanted)
    shape = TextShape(made, asked.model, serving.tokens, scores=asked.logprobs is not None)
    return await answer(request, made, shape, stream=asked.stream, with_usage=asked.with_usage)


async def _prompts(asked: CompletionRequest, tokens: Tokens) -> list[tuple[int, ...]]:
    prompt = asked.prompt
    if isinstance(prompt, str):
        return [await tokens.of_text(prompt)]
    if isinstance(prompt[0], int):
        return [tuple(prompt)]
    return [await tokens.of_text(one) if isinstance(one, str) else tuple(one) for one in prompt]


class TextShape:
    """Pieces as `text_completion`s; a text and its end are one chunk."""

    def __init__(self, made: Asking, model: str, tokens: Tokens, *, scores: bool) -> None:
        self._made = made
        self._model = model
        self._tokens = tokens
        self._scores = scores
        self._id = f"cmpl-{made.choices[0].job.id}"
        self._created = int(time.time())

    def opening(self) -> Sequence[Completion]:
        """Nothing comes before the text."""
        return ()

    def chunks(self, piece: Piece) -> Sequence[Completion]:
        """One, or none where there is nothing new."""
        if not (piece.text or piece.scored or piece.reason):
            return ()
        return (self._completion([self._choice([piece])], None),)

    def usage_chunk(self, usage: Usage) -> Completion:
        """No choices, the usage alone."""
        return self._completion([], usage)

    def reply(self, pieces: Sequence[Sequence[Piece]], usage: Usage) -> Completion:
        """All choices in order."""
        return self._completion([self._choice(of_choice) for of_choice in pieces], usage)

    def _completion(self, choices: list[CompletionChoice], usage: Usage | None) -> Completion:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "system_fingerprint": f"antefix-{VERSION}",
            "choices": choices,
            "usage": usage,
        }

    def _choice(self, pieces: Sequence[Piece]) -> CompletionChoice:
        return {
            "index": pieces[0].index,
            "text": "".join(piece.text for piece in pieces),
            "logprobs": self._logprobs(pieces) if self._scores else None,
            "finish_reason": pieces[-1].reason,
        }

    def _logprobs(self, pieces: Sequence[Piece]) -> CompletionLogprobs:
        name_of = self._tokens.name_of
        scored = [one for piece in pieces for one in piece.scored]
        return {
            "tokens": [name_of(one.id) for one in scored],
            "token_logprobs": [one.logprob for one in scored],
            # The token itself is always among them, so there may be one more than was asked for.
            "top_logprobs": [
                None if one.logprob is None else {name_of(t): v for t, v in ((one.id, one.logprob), *one.top)}
                for one in scored
            ],
            "text_offset": [one.offset for one in scored],
        }
