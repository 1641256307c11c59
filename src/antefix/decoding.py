"""How texts are decoded: choices for transformers' `generate`, as a recipe, a card and the command line hold them."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Decoding(BaseModel):
    """How to decode; the names and meanings are those of transformers' `generate`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    max_new_tokens: int = Field(100, ge=1)
    """A text ends at the end token, or after so many."""
    min_new_tokens: int = Field(0, ge=0)
    """The end token is not chosen before so many."""
    num_beams: int = Field(1, ge=1)
    """1: greedy (or sampling); the paper decodes tables with 5."""
    length_penalty: float = 1.0
    """Beams only: above 0 favours longer texts."""
    early_stopping: bool = False
    """Beams only: stop as soon as there are `num_beams` finished texts."""
    do_sample: bool = False
    """Draw tokens instead of taking the most likely one."""
    temperature: float = Field(1.0, gt=0)
    """Sampling only: below 1 sharpens the distribution, above 1 flattens it."""
    top_k: int = Field(50, ge=0)
    """Sampling only: draw from so many of the most likely tokens; 0: from all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sampling only: draw from the most likely tokens that have this probability together."""
    repetition_penalty: float = Field(1.0, gt=0)
    """Above 1 makes tokens that were there already less likely."""
    no_repeat_ngram_size: int = Field(0, ge=0)
    """No run of so many tokens occurs twice; 0: any may."""
    prompt_lookup_num_tokens: int | None = Field(None, ge=1)
    """Guess so many tokens from the source (one row at a time, without beams, transformers' limits)."""
    cache_implementation: Literal["dynamic", "static", "offloaded", "offloaded_static"] | None = None
    """None: a growing cache; `static`: one of fixed size."""
    frames: bool = False
    """Write well-formed frames of TOP and nothing else; with the labels of the prefix's new tokens, if it has some."""
    seed: int | None = None
    """Seed of sampling, set once before the first batch."""

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens {self.min_new_tokens} is more than max_new_tokens {self.max_new_tokens}")
        if self.prompt_lookup_num_tokens is not None and self.num_beams > 1:
            raise ValueError("prompt_lookup_num_tokens works without beams only: set num_beams = 1")
        return self

    def arguments(self) -> dict[str, Any]:
        """For `generate`; what has no effect is left out, since transformers warns of it."""
        given: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "num_beams": self.num_beams,
            "do_sample": self.do_sample,
        }
        if self.min_new_tokens:
            given["min_new_tokens"] = self.min_new_tokens
        if self.num_beams > 1:
            given |= {"length_penalty": self.length_penalty, "early_stopping": self.early_stopping}
        if self.do_sample:
            given |= {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        if self.repetition_penalty != 1.0:
            given["repetition_penalty"] = self.repetition_penalty
        if self.no_repeat_ngram_size:
            given["no_repeat_ngram_size"] = self.no_repeat_ngram_size
        if self.prompt_lookup_num_tokens is not None:
            given["prompt_lookup_num_tokens"] = self.prompt_lookup_num_tokens
        if self.cache_implementation is not None:
            given["cache_implementation"] = self.cache_implementation
        return given
