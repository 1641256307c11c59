"""The task of writing texts; parses in brackets are texts, too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from antefix.data.encode import Encoded, Limits, encode
from antefix.data.example import Example
from antefix.data.linearise import TextFormat
from antefix.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextTask(Task):
    """A task whose targets are written token by token."""

    metrics: ClassVar[tuple[str, ...]] = ("bleu", "accuracy", "frame_f1")
    writes_text: ClassVar[bool] = True

    name: Literal["text_generation"] = "text_generation"

    def encode(
        self,
        examples: Sequence[Example],
        text_format: TextFormat,
        tokenizer: PreTrainedTokenizerBase,
        limits: Limits,
        *,
        for_encoder: bool,
    ) -> Encoded:
        """Token ids of the sources and of all their targets. See `antefix.data.encode.encode`."""
        return encode(examples, text_format, tokenizer, limits, for_encoder=for_encoder)
