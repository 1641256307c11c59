"""`POST /v1/chat/completions`: conversations, in the base's template or in the format of a prefix."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from antefix.data.example import Chat
from antefix.data.example import Message as Turn
from antefix.server import VERSION
from antefix.server.answering import answer
from antefix.server.asking import Asking, Wanted, asking
from antefix.server.formats import encode, format_of
from antefix.server.keys import Caller
from antefix.server.refusal import Refusal
from antefix.server.replies import ChatChunk, ChatCompletion, ChatLogprobs, Delta, Reason, TopLogprob, Usage
from antefix.server.serving import caller_of, serving_of
from antefix.server.wire import ChatRequest
from antefix.server.writing import Piece

if TYPE_CHECKING:
    from antefix.data.linearise import TextFormat
    from antefix.server.models import Chosen
    from antefix.server.serving import Serving
    from antefix.server.tokens import Tokens

routes = APIRouter()


@routes.post("/v1/chat/completions", response_model=ChatCompletion)
async def chat(asked: ChatRequest, request: Request, caller: Annotated[Caller, Depends(caller_of)]) -> Response:
    """Write the next turn of a conversation."""
    serving = serving_of(request)
    chosen = serving.choose(asked, caller)
    text_format = format_of(serving, chosen)
    prompt = await _prompt(asked, serving, chosen, text_format)
    max_tokens = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    wanted = Wanted(max_tokens=max_tokens, logprobs=logprobs, strip=text_format is not None)
    made = asking(serving, asked, chosen, [prompt], wanted)
    shape = ChatShape(made, asked.model, serving.tokens, scores=asked.logprobs)
    return await answer(request, made, shape, stream=asked.stream, with_usage=asked.with_usage)


async def _prompt(
    asked: ChatRequest, serving: Serving, chosen: Chosen, text_format: TextFormat | None
) -> tuple[int, ...]:
    """A prefix reads what it was trained to read; without one, or without a format of its own, the template's text.

    A prefix that was trained on conversations puts its instruction before them. One that was trained on tables or
    plain sources is given the one message of the user as such. Raises Refusal for any other conversation.
    """
    messages = asked.messages
    if text_format is None:
        turns = [{"role": "system" if m.role == "developer" else m.role, "content": m.text} for m in messages]
        return await serving.tokens.of_chat(turns)
    if text_format.chat:
        if messages[-1].role == "assistant":
            raise Refusal(400, "this prefix writes whole turns: the last message must be the user's", param="messages")
        chat = Chat(tuple(Turn("system" if m.role == "developer" else m.role, m.text) for m in messages))
        return await encode(serving.tokens, text_format, chat)
    if [m.role for m in messages] != ["user"]:
        raise Refusal(
            400,
            f"the prefix '{chosen.prefixes[0]}' was not trained on conversations: send one message of the user, with "
            "the source in it",
            param="messages",
        )
    return await encode(serving.tokens, text_format, messages[0].text)


class ChatShape:
    """Pieces as turns; in a stream the role comes first, and the reason of the end in a chunk of its own."""

    def __init__(self, made: Asking, model: str, tokens: Tokens, *, scores: bool) -> None:
        self._made = made
        self._model = model
        self._tokens = tokens
        self._scores = scores
        self._id = f"chatcmpl-{made.choices[0].job.id}"
        self._created = int(time.time())

    def opening(self) -> Sequence[ChatChunk]:
        """Every choice's role."""
        return [self._chunk(choice.index, {"role": "assistant", "content": ""}, ()) for choice in self._made.choices]

    def chunks(self, piece: Piece) -> Sequence[ChatChunk]:
        """What is new, then the end."""
        found = []
        if piece.text or piece.scored:
            found.append(self._chunk(piece.index, {"content": piece.text}, [piece]))
        if piece.reason is not None:
            found.append(self._chunk(piece.index, {}, (), piece.reason))
        return found

    def usage_chunk(self, usage: Usage) -> ChatChunk:
        """No choices, the usage alone."""
        return {**self._head(), "choices": [], "usage": usage}

    def reply(self, pieces: Sequence[Sequence[Piece]], usage: Usage) -> ChatCompletion:
        """All choices in order."""
        head = self._head()
        return {
            "id": head["id"],
            "object": "chat.completion",
            "created": head["created"],
            "model": head["model"],
            "system_fingerprint": head["system_fingerprint"],
            "choices": [
                {
                    "index": index,
                    "message": {
                        "role": "assistant",
                        "content": "".join(piece.text for piece in of_choice),
                        "refusal": None,
                    },
                    "logprobs": self._logprobs(of_choice),
                    "finish_reason": of_choice[-1].reason,
                }
                for index, of_choice in enumerate(pieces)
            ],
            "usage": usage,
        }

    def _head(self) -> ChatChunk:
        return {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._model,
            "system_fingerprint": f"antefix-{VERSION}",
            "choices": [],
            "usage": None,
        }

    def _chunk(self, index: int, delta: Delta, pieces: Sequence[Piece], reason: Reason | None = None) -> ChatChunk:
        logprobs = self._logprobs(pieces) if pieces else None
        return {
            **self._head(),
            "choices": [{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}],
        }

    def _logprobs(self, pieces: Sequence[Piece]) -> ChatLogprobs | None:
        if not self._scores:
            return None
        return {
            "content": [
                {**self._top(one.id, one.logprob or 0.0), "top_logprobs": [self._top(*top) for top in one.top]}
                for piece in pieces
                for one in piece.scored
            ],
            "refusal": None,
        }

    def _top(self, token_id: int, logprob: float) -> TopLogprob:
        found = self._tokens.bytes_of(token_id)
        return {"token": found.decode(errors="replace"), "logprob": logprob, "bytes": list(found)}
