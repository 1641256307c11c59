"""What tasks have in common that label whole texts, their words or triples.

Labels are read off hidden states by a small head that is trained and kept with the prefix, or they are words of the
base.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import model_validator

from antefix.data.encode import Encoded, EncodedExample, Limits, where_of
from antefix.data.example import Example, Source
from antefix.data.linearise import TextFormat
from antefix.errors import DataError
from antefix.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LabelTask(Task):
    """A task that labels, with the names of its labels: a label's number is its place among them."""

    may_have_words: ClassVar[bool] = False
    """Whether words of the base can stand for the labels."""
    reads_symbols: ClassVar[bool] = True
    """Whether sources may hold a method's new tokens."""
    if_too_long: ClassVar[str] = "shorten it, or set data.max_source_tokens to have texts cut"
    """What to do with a source that does not fit into the base's context."""

    labels: tuple[str, ...]
    word_ids: tuple[int, ...] = ()
    """The token that stands for each label, where the base's own head says them; empty: a head is learned."""

    @model_validator(mode="after")
    def _a_word_for_every_label(self) -> Self:
        if self.word_ids and (len(set(self.word_ids)) != len(self.labels) or not self.may_have_words):
            raise ValueError("word_ids: one for every label of a classification, all different")
        return self

    @classmethod
    def of(cls, examples: Sequence[Example], *, length_norm: float = 1.0) -> Self:
        """With the labels that these examples have. Raises DataError where they are not the task's kind."""
        labels = {label for e in examples for target in e.targets for label in cls.labels_in(target)}
        if len(labels) < 2:
            name = cls.model_fields["name"].default
            raise DataError(f"{name} needs at least two different labels, the training data has {sorted(labels)}")
        return cls(labels=tuple(sorted(labels)))  # type: ignore[call-arg]  # a task of its own has a name

    def encode(
        self,
        examples: Sequence[Example],
        text_format: TextFormat,
        tokenizer: PreTrainedTokenizerBase,
        limits: Limits,
        *,
        for_encoder: bool,
    ) -> Encoded:
        """Token ids, where labels are read off, and the labels' numbers.

        Raises DataError naming the row for a label that the task does not know, for labels that are not one a place,
        and for a text that does not fit; and for a text format of which the task would do nothing.
        """
        self.check_format(text_format)
        encoded, num_cut = [], 0
        encode = self.encoder(text_format, tokenizer, for_encoder=for_encoder)
        for example in examples:
            try:
                ids, places, cut = encode(example.source)
            except DataError as error:
                raise DataError(f"{where_of(example)}: {error}") from error
            num_cut += cut
            if limits.context is not None and len(ids) > limits.context:
                raise DataError(
                    f"{where_of(example)}: {len(ids)} tokens do not fit into the base's context of {limits.context}; "
                    f"{self.if_too_long}"
                )
            targets = tuple(self._numbers(target, where_of(example)) for target in example.targets)
            for target in targets:
                if len(target) != len(places):
                    raise DataError(
                        f"{where_of(example)}: {len(target)} tags for {len(places)} words: one a word is needed"
                    )
            encoded.append(EncodedExample(tuple(ids), targets, places=tuple(places)))
        return Encoded(tuple(encoded), num_cut, 0)

    @abstractmethod
    def encoder(
        self, text_format: TextFormat, tokenizer: PreTrainedTokenizerBase, *, for_encoder: bool
    ) -> Callable[[Source], tuple[list[int], list[int], bool]]:
        """What makes token ids of a source; the places that its labels are read off; whether it was cut."""

    def check_format(self, text_format: TextFormat) -> None:
        """Raises DataError for a text format of which the task would do nothing."""

    @staticmethod
    def labels_in(target: str) -> list[str]:
        """The labels that a target names."""
        return [target]

    def text_of(self, numbers: Sequence[int]) -> str:
        """A prediction as examples have it: the label, or the tags separated by spaces."""
        return " ".join(self.labels[n] for n in numbers)

    def _numbers(self, target: str, where: str) -> tuple[int, ...]:
        number_of = {label: n for n, label in enumerate(self.labels)}
        labels = self.labels_in(target)
        if unknown := next((label for label in labels if label not in number_of), None):
            raise DataError(f"{where}: the label '{unknown}' is not in the training data ({', '.join(self.labels)})")
        return tuple(number_of[label] for label in labels)


def at_one_place(write: Callable[[Source], tuple[list[int], bool]], *, for_encoder: bool) -> Callable[
    [Source], tuple[list[int], list[int], bool]
]:  # fmt: skip
    """Of what makes token ids of a source: with the place of its one label, an encoder's first or a decoder's last."""

    def encode(source: Source) -> tuple[list[int], list[int], bool]:
        ids, cut = write(source)
        return ids, [0 if for_encoder else len(ids) - 1], cut

    return encode
