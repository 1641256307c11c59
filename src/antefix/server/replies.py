"""What clients get back: the shapes of replies and of the chunks of a stream, as OpenAI's interface has them."""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import TypedDict

Reason = Literal["stop", "length"]


class PromptTokensDetails(TypedDict):
    """What the prompt's tokens do not say."""

    cached_tokens: int
    prefix_tokens: int
    """Slots of prefixes that the prompt was read with; not part of `prompt_tokens`."""


class Usage(TypedDict):
    """How much was read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(TypedDict):
    """The scores of `/v1/completions`: lists of one length."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """One text, or the next piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Reason | None


class Completion(TypedDict):
    """The reply of `/v1/completions` and `/v1/tables`; in a stream each of its chunks."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None


class TopLogprob(TypedDict):
    """A token that might have stood there."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    """The token that stands there."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """The scores of `/v1/chat/completions`."""

    content: list[ChatLogprob]
    refusal: None


class ChatMessage(TypedDict):
    """The turn that was written."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Reason | None


class ChatCompletion(TypedDict):
    """The reply of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(TypedDict, total=False):
    """What is new: the role first, then pieces of the content, nothing at the end."""

    role: Literal["assistant"]
    content: str


class ChunkChoice(TypedDict):
    """The next piece of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Reason | None


class ChatChunk(TypedDict):
    """A chunk of a stream of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None


class OfPrefix(TypedDict, total=False):
    """What the list says of a prefix, beside what every client knows."""

    name: str
    method: str | None
    num_virtual_tokens: int | None
    tags: list[str]
    licence: str | None
    scores: dict[str, Any]
    resident: bool
    card: dict[str, Any]
    """All of it, where one model is asked for."""


class Model(TypedDict):
    """The base, or a prefix on it."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    antefix: OfPrefix | None


class ModelList(TypedDict):
    """The reply of `/v1/models`."""

    object: Literal["list"]
    data: list[Model]
    has_more: bool


class ErrorContent(TypedDict):
    """Why a request was refused."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(TypedDict):
    """The body of every reply that is none."""

    error: ErrorContent
