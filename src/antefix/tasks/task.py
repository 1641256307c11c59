"""What every task answers.

Shared code never asks for a task's name: it asks what is declared here, or of which kind a task is, since one that
labels (`LabelTask`) and one that ranks (`RankingTask`) have answers of their own.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict

from antefix.data.encode import Encoded, Limits
from antefix.data.example import Example
from antefix.data.linearise import TextFormat
from antefix.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TaskName = Literal["text_generation", "classification", "tagging", "ranking", "triples"]


class Task(BaseModel):
    """What is learned from examples. Cards keep it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    metrics: ClassVar[tuple[str, ...]]
    """Scores that can choose the best step, beside the dev loss; the first is what recipes are compared by."""
    writes_text: ClassVar[bool] = False
    """Whether answers are texts that are decoded; else they are labels, or choices."""
    draws_negatives: ClassVar[bool] = False
    """Whether false examples are drawn for those that are learned from (`with_negatives`)."""

    name: TaskName

    @classmethod
    def of(cls, examples: Sequence[Example], *, length_norm: float = 1.0) -> Self:
        """The task of these training examples. Raises DataError where they are not its kind.

        length_norm: of a `RankingTask`; others have no use for it.
        """
        return cls()  # type: ignore[call-arg]  # a task of its own has a name

    @abstractmethod
    def encode(
        self,
        examples: Sequence[Example],
        text_format: TextFormat,
        tokenizer: PreTrainedTokenizerBase,
        limits: Limits,
        *,
        for_encoder: bool,
    ) -> Encoded:
        """Token ids of the sources, and of what is learned of each. Raises DataError naming the row that cannot be."""

    def check_targets(self, examples: Sequence[Example]) -> None:
        """Raises DataError for an example without the target that learning from it takes."""

    def with_words(self, words: Mapping[str, str], tokenizer: PreTrainedTokenizerBase) -> Self:
        """With a word of the base for every label. Raises DataError where labels have no words."""
        raise DataError(f"words for labels are for classification, not for {self.name}")

    @classmethod
    def with_negatives(
        cls, examples: Sequence[Example], negatives: int, seed: int, num_draws: int = 1
    ) -> Sequence[Example]:
        """With false examples among them, `num_draws` times, each with other ones. Of tasks with `draws_negatives`."""
        raise NotImplementedError

    @classmethod
    def scored_in_test(cls, test: Sequence[Example], others: Sequence[Example], seed: int) -> Sequence[Example]:
        """A test set as it is scored. others: of the training and dev set, of which nothing may come up as false."""
        return test

    def scored_in_training(
        self, train: Sequence[Example], dev: Sequence[Example], count: int, seed: int
    ) -> Sequence[Example]:
        """The beginning of a dev set, about `count` examples, as it is scored while training."""
        return [e for e in dev if e.targets][:count]
