"""Tasks that label whole texts (`classification`: one label), their words (`tagging`: a tag each) or triples.

Labels are read off hidden states by a small head that is trained and kept with the prefix, or they are words of the
base.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from antefix.data.encode import Encoded, EncodedExample, Limits, where_of
from antefix.data.example import Example, Source, Words
from antefix.data.linearise import TextFormat
from antefix.errors import DataError
from antefix.tasks.triples import FALSE, TRUE, TripleEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LabelTaskName = Literal["classification", "tagging", "triples"]


class LabelTask(BaseModel):
    """A task that labels, with the names of its labels: a label's number is its place among them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: LabelTaskName
    labels: tuple[str, ...]
    word_ids: tuple[int, ...] = ()
    """The token that stands for each label, where the base's own head says them; empty: a head is learned."""

    @model_validator(mode="after")
    def _a_word_for_every_label(self) -> LabelTask:
        if self.word_ids and (len(set(self.word_ids)) != len(self.labels) or self.name != "classification"):
            raise ValueError("word_ids: one for every label of a classification, all different")
        return self

    @classmethod
    def of(cls, name: LabelTaskName, examples: Sequence[Example]) -> LabelTask:
        """With the labels that these examples have. Raises DataError where they are not the task's kind."""
        if name == "triples":
            return cls(name=name, labels=(TRUE, FALSE))
        labels: set[str] = set()
        for example in examples:
            if name == "tagging" and not isinstance(example.source, Words):
                raise DataError(f"{where_of(example)}: tagging needs words with tags: a .conll file, or words and tags")
            labels.update(label for target in example.targets for label in _labels_in(name, target))
        if len(labels) < 2:
            raise DataError(f"{name} needs at least two different labels, the training data has {sorted(labels)}")
        return cls(name=name, labels=tuple(sorted(labels)))

    def with_words(self, words: Mapping[str, str], tokenizer: PreTrainedTokenizerBase) -> LabelTask:
        """With a word of the base for every label: the first token of each, as it stands after a source.

        Raises DataError where a label has no word, two begin alike, or the task labels no whole texts.
        """
        if self.name != "classification":
            raise DataError(f"words for labels are for classification, not for {self.name}")
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

        A whole text's label is read off an encoder's first token and a decoder's last one; a word's off its first token
        in an encoder, its last one in a decoder. Raises DataError naming the row for a label that the task does not
        know, for tags that are not one a word, and for a text that does not fit; and for a text format of which tagging
        would do nothing.
        """
        if self.name == "tagging":
            _check_words_alone(text_format)
        encoded, num_cut = [], 0
        encode = self.encoder(text_format, tokenizer, for_encoder=for_encoder)
        for example in examples:
            try:
                ids, places, cut = encode(example.source)
            except DataError as error:
                raise DataError(f"{where_of(example)}: {error}") from error
            num_cut += cut
            if limits.context is not None and len(ids) > limits.context:
                todo = "shorten it, or set data.max_source_tokens to have texts cut"
                raise DataError(
                    f"{where_of(example)}: {len(ids)} tokens do not fit into the base's context of {limits.context}; "
                    f"{'split the text' if self.name == 'tagging' else todo}"
                )
            targets = tuple(self._numbers(target, where_of(example)) for target in example.targets)
            for target in targets:
                if len(target) != len(places):
                    raise DataError(
                        f"{where_of(example)}: {len(target)} tags for {len(places)} words: one a word is needed"
                    )
            encoded.append(EncodedExample(tuple(ids), targets, places=tuple(places)))
        return Encoded(tuple(encoded), num_cut, 0)

    def encoder(
        self, text_format: TextFormat, tokenizer: PreTrainedTokenizerBase, *, for_encoder: bool
    ) -> Callable[[Source], tuple[list[int], list[int], bool]]:
        """What makes token ids of a source; the places that its labels are read off; whether it was cut."""
        if self.name == "tagging":
            return partial(_encode_words, tokenizer=tokenizer, for_encoder=for_encoder)
        write: Callable[[Source], tuple[list[int], bool]] = (
            TripleEncoder(text_format, tokenizer, for_encoder=for_encoder)
            if self.name == "triples"
            else partial(text_format.encode_source_cut, tokenizer, for_encoder=for_encoder)
        )

        def encode(source: Source) -> tuple[list[int], list[int], bool]:
            ids, cut = write(source)
            return ids, [0 if for_encoder else len(ids) - 1], cut

        return encode

    def text_of(self, numbers: Sequence[int]) -> str:
        """A prediction as examples have it: the label, or the tags separated by spaces."""
        return " ".join(self.labels[n] for n in numbers)

    def _numbers(self, target: str, where: str) -> tuple[int, ...]:
        number_of = {label: n for n, label in enumerate(self.labels)}
        labels = _labels_in(self.name, target)
        if unknown := next((label for label in labels if label not in number_of), None):
            raise DataError(f"{where}: the label '{unknown}' is not in the training data ({', '.join(self.labels)})")
        return tuple(number_of[label] for label in labels)


def _check_words_alone(text_format: TextFormat) -> None:
    for name in ("instruction", "before_source", "chat", "max_source_tokens"):
        if getattr(text_format, name) != TextFormat.model_fields[name].default:
            raise DataError(f"tagging reads words as they stand, '{name}' would do nothing: leave it out")


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


def _labels_in(name: LabelTaskName, target: str) -> list[str]:
    return target.split() if name == "tagging" else [target]
