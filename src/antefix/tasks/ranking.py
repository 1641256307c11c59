"""The task of choosing: of an example's own choices the one that the base finds likeliest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from antefix.data.encode import Encoded, Limits, encode, where_of
from antefix.data.example import Example
from antefix.data.linearise import TextFormat
from antefix.errors import DataError
from antefix.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RankingTask(Task):
    """A task whose examples bring their choices."""

    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)

    name: Literal["ranking"] = "ranking"
    length_norm: float = 1.0
    """A choice's log-likelihood is divided by its length to this power."""

    @classmethod
    def of(cls, examples: Sequence[Example], *, length_norm: float = 1.0) -> Self:
        return cls(length_norm=length_norm)

    def encode(
        self,
        examples: Sequence[Example],
        text_format: TextFormat,
        tokenizer: PreTrainedTokenizerBase,
        limits: Limits,
        *,
        for_encoder: bool,
    ) -> Encoded:
        """Token ids of the sources and of all choices, and which is right where one is known.

        Raises DataError naming the row for an example with fewer than two choices, or with two that are right.
        """
        for example in examples:
            if len(set(example.choices)) < 2 or len(set(example.choices)) != len(example.choices):
                raise DataError(f"{where_of(example)}: ranking needs choices, two or more, all different")
            if len(example.targets) > 1 or not set(example.targets) <= set(example.choices):
                raise DataError(f"{where_of(example)}: the target of ranking is one of the choices")
        with_choices = [replace(example, targets=example.choices) for example in examples]
        encoded = encode(with_choices, text_format, tokenizer, limits, for_encoder=for_encoder)
        right = [e.choices.index(e.targets[0]) if e.targets else -1 for e in examples]
        made = (replace(e, right=n) for e, n in zip(encoded.examples, right, strict=True))
        return replace(encoded, examples=tuple(made), are_choices=True)

    def check_targets(self, examples: Sequence[Example]) -> None:
        if unknown := next((e for e in examples if e.choices and not e.targets), None):
            raise DataError(
                f"{where_of(unknown)}: ranking is learned from right choices, and this example names none: name their "
                "column with data.reader.target_column"
            )
