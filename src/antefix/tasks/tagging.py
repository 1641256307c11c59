"""The task of tagging words: a tag each."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from antefix.data.encode import where_of
from antefix.data.example import Example, Source, Words
from antefix.data.linearise import TextFormat
from antefix.errors import DataError
from antefix.tasks.label import LabelTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TaggingTask(LabelTask):
    """A tag a word, read off the word's first token in an encoder and its last one in a decoder."""

    metrics: ClassVar[tuple[str, ...]] = ("span_f1", "word_accuracy")
    reads_symbols: ClassVar[bool] = False
    if_too_long: ClassVar[str] = "split the text"

    name: Literal["tagging"] = "tagging"

    @classmethod
    def of(cls, examples: Sequence[Example], *, length_norm: float = 1.0) -> Self:
        for example in examples:
            if not isinstance(example.source, Words):
                raise DataError(f"{where_of(example)}: tagging needs words with tags: a .conll file, or words and tags")
        return super().of(examples)

    def check_format(self, text_format: TextFormat) -> None:
        for name in ("instruction", "before_source", "chat", "max_source_tokens"):
            if getattr(text_format, name) != TextFormat.model_fields[name].default:
                raise DataError(f"tagging reads words as they stand, '{name}' would do nothing: leave it out")

    @staticmethod
    def labels_in(target: str) -> list[str]:
        return target.split()

    def encoder(
        self, text_format: TextFormat, tokenizer: PreTrainedTokenizerBase, *, for_encoder: bool
    ) -> Callable[[Source], tuple[list[int], list[int], bool]]:
        return partial(_encode_words, tokenizer=tokenizer, for_encoder=for_encoder)


def _encode_words(
    source: Source, tokenizer: PreTrainedTokenizerBase, for_encoder: bool
) -> tuple[list[int], list[int], bool]:
    """A word of which a tokenizer makes nothing (of signs that it drops) stands as the unknown one: each has a tag."""
    if not isinstance(source, Words):
        raise DataError("tagging needs words")
    words = list(source.words)
    ids, places = _tokenised_words(words, tokenizer, for_encoder)
    if nothing := set(range(len(words))) - set(places):
        if tokenizer.unk_token is None:
            raise DataError(f"the tokenizer makes nothing of '{words[min(nothing)]}' (word {min(nothing) + 1})")
        words = [tokenizer.unk_token if n in nothing else word for n, word in enumerate(words)]
        ids, places = _tokenised_words(words, tokenizer, for_encoder)
    return ids, [places[n] for n in range(len(words))], False


def _tokenised_words(
    words: Sequence[str], tokenizer: PreTrainedTokenizerBase, for_encoder: bool
) -> tuple[list[int], dict[int, int]]:
    """Token ids of words with spaces between them, as a base has read texts, and the place each is labelled at."""
    ends = list(accumulate(len(word) + 1 for word in words))
    found = tokenizer(" ".join(words), return_offsets_mapping=True)
    places: dict[int, int] = {}
    for place, (start, end) in enumerate(found["offset_mapping"]):
        # A token may hold the space before its word: its last sign tells which that is. The space alone is no word.
        word = bisect_right(ends, end - 1)
        is_of_word = end > start and end < ends[word]
        if is_of_word and (word not in places or not for_encoder):
            places[word] = place
    return list(found["input_ids"]), places
