"""What clients send: the types of requests, as OpenAI's interface has them, and ours beside it.

What is not said takes its default, and so does `null`. What cannot change the answer is ignored (`IGNORED`); what would
change it and cannot be had is refused (`REFUSED`), unless it asks for what is done anyway; every other unknown field is
refused, with the nearest known one. Nothing is silently left undone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from antefix.errors import nearest

IGNORED = frozenset(
    {
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
        "parallel_tool_calls", "verbosity",
    }
)  # fmt: skip
"""Whom it is for, where it is kept, what it may cost: nothing of the text depends on these."""

REFUSED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "suffix": ("",),
    "min_p": (0,),
    "top_k": (0, -1),
    "repetition_penalty": (1,),
    "use_beam_search": (False,),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
}
"""Cannot be had; the values that ask for what is done anyway."""

MOST_STOPS = 4
MOST_CHOICES = 16
MOST_PROMPTS = 128
MOST_LOGPROBS = 20
MOST_BIASES = 1024
MOST_PREFIXES = 8
_INT64 = 2**63 - 1
_NO_TEXT = re.compile("[\0\ud800-\udfff]")

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Name = Annotated[str, Field(min_length=1, max_length=512)]


class _Sent(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _said(cls, content: Any) -> Any:
        """Only what is said and is of interest. Raises for a field that is not known, or cannot be had."""
        if not isinstance(content, Mapping):
            return content
        said = {name: value for name, value in content.items() if value is not None}
        for name, value in list(said.items()):
            if name in cls.model_fields:
                continue
            if name in REFUSED and value not in REFUSED[name]:
                raise PydanticCustomError(
                    "unsupported_field", "'{param}' is not supported here: leave it out", {"param": name}
                )
            if name not in IGNORED and name not in REFUSED:
                raise PydanticCustomError(
                    "unknown_field",
                    "unknown field '{param}': {hint}",
                    {"param": str(name)[:60], "hint": nearest(str(name)[:60], cls.model_fields)},
                )
            del said[name]
        return said


class _Body(_Sent):
    """A whole request: its texts, also those of what stands in it, are looked through once, and before all else."""

    @model_validator(mode="before")
    @classmethod
    def _texts(cls, content: Any) -> Any:
        """Raises for texts that are none: with a NUL, or with half a surrogate pair."""
        left = [content]  # a stack, since requests nest
        while left:
            found = left.pop()
            if isinstance(found, Mapping):
                left += found.keys()
                left += found.values()
            elif isinstance(found, list):
                left += found
            elif isinstance(found, str) and _NO_TEXT.search(found):
                raise PydanticCustomError("no_text", "a text holds a NUL or half a surrogate pair: take it out")
        return content


class StreamOptions(_Sent):
    """What a stream tells beside the text."""

    include_usage: bool = False
    """A last chunk with the usage."""
    include_obfuscation: bool = False
    """Accepted and not done: there is no padding in our chunks."""


class Extension(_Sent):
    """Our own field of a request."""

    prefixes: Annotated[tuple[Name, ...], Field(min_length=1, max_length=MOST_PREFIXES)]
    """Several prefixes of the bank on this one request, in this order; `model` then names the base."""


class Asked(_Body):
    """What all requests for a text have in common."""

    model: Name
    """The base's id, a prefix's (`base:prefix`), or a prefix's own name."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    """So many texts for every prompt."""
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] = Field(default_factory=list)
    """Where a text ends; not part of it."""
    seed: Annotated[int, Field(ge=-_INT64 - 1, le=_INT64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    """0 takes the likeliest token, as a temperature of 0 does."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] = 0.0
    logit_bias: Annotated[
        dict[
            Annotated[str, Field(pattern="^[0-9]{1,9}$")],
            Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)],
        ],
        Field(max_length=MOST_BIASES),
    ] = Field(default_factory=dict)
    """Token id, written as text, to what is added to its logit."""
    ignore_eos: bool = False
    """Write on past the token that ends a text, and past stop strings: for measurements."""
    antefix: Extension | None = None

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "'{param}' needs stream = true", {"param": "stream_options"})
        return self

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings; none where ends are ignored."""
        if self.ignore_eos:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class CompletionRequest(Asked):
    """`POST /v1/completions`."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    """A text or its token ids, or several of these."""
    max_tokens: Annotated[int, Field(ge=0, le=1_000_000)] = 16
    echo: bool = False
    """The prompt, and with `logprobs` its scores, before the text."""
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    """So many likeliest tokens at every place, beside the chosen one."""
    best_of: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    """As `n`, or not at all."""

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.best_of is not None and self.best_of != self.n:
            raise PydanticCustomError("best_of", "'{param}' other than n is not supported", {"param": "best_of"})
        if self.max_tokens == 0 and not self.echo:
            raise PydanticCustomError("max_tokens", "'{param}' = 0 needs echo = true", {"param": "max_tokens"})
        return self


class TextPart(_Sent):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class Message(_Sent):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)] = ""
    name: str | None = None
    """Accepted and not shown to the model: chat templates have no place for it."""

    @property
    def text(self) -> str:
        """The content in one piece."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Asked):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "'{param}' needs logprobs = true", {"param": "top_logprobs"})
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise PydanticCustomError(
                "max_tokens", "'{param}' and max_completion_tokens differ: give one", {"param": "max_tokens"}
            )
        return self


class TableRequest(Asked):
    """`POST /v1/tables`: a table (or whatever the prefix reads) in, a text out, in the prefix's own text format."""

    table: (
        str
        | Annotated[dict[str, str | int | float | bool | None], Field(min_length=1)]
        | Annotated[list[Any], Field(min_length=1)]
    )
    """An object of fields, `[field, value]` pairs, triples, or one of these as a person types it."""
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """None: what the prefix's card says."""


class LoadRequest(_Body):
    """`POST /v1/load_prefix`."""

    prefix_name: Name
    prefix_path: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    """Its folder in the bank, where that is not its name; nowhere else is looked."""
    pin: bool = False
    """Keep it in memory until it is unloaded."""


class UnloadRequest(_Body):
    """`POST /v1/unload_prefix`."""

    prefix_name: Name
