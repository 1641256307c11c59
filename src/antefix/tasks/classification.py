"""The task of labelling whole texts: by a head that is learned, or by words of the base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from antefix.data.example import Source
from antefix.data.linearise import TextFormat
from antefix.errors import DataError
from antefix.tasks.label import LabelTask, at_one_place

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ClassificationTask(LabelTask):
    """One label a text, read off an encoder's first token or a decoder's last one."""

    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)
    may_have_words: ClassVar[bool] = True

    name: Literal["classification"] = "classification"

    def with_words(self, words: Mapping[str, str], tokenizer: PreTrainedTokenizerBase) -> ClassificationTask:
        """With a word of the base for every label: the first token of each, as it stands after a source.

        Raises DataError where a label has no word, or two begin alike.
        """
        if words.keys() != set(self.labels):
            raise DataError(
                f"words for labels: the labels are {', '.join(self.labels)}, words are given for {', '.join(words)}"
            )
        first: dict[str, int] = {}
        for label in self.labels:
            ids = tokenizer(words[label], add_special_tokens=False)["input_ids"]
            if not ids:
                raise DataError(f"words for labels: '{words[label]}' has no tokens")
            if twin := next((other for other, token in first.items() if token == ids[0]), None):
                raise DataError(f"words for labels: '{words[label]}' and '{words[twin]}' begin with the same token")
            first[label] = ids[0]
        return self.model_copy(update={"word_ids": tuple(first.values())})

    def encoder(
        self, text_format: TextFormat, tokenizer: PreTrainedTokenizerBase, *, for_encoder: bool
    ) -> Callable[[Source], tuple[list[int], list[int], bool]]:
        write = partial(text_format.encode_source_cut, tokenizer, for_encoder=for_encoder)
        return at_one_place(write, for_encoder=for_encoder)
