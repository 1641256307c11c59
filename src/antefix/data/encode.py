"""Examples as token ids: sources and targets apart, what is too long cut and counted, or refused with its row.

Knows the text format and the tokenizer, and nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from antefix.data.example import Example
from antefix.data.linearise import TextFormat
from antefix.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SoftLabel = tuple[tuple[int, float], ...]
"""The likeliest tokens at a place and their probabilities."""


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """Token ids of a source and of each of its targets (end token included)."""

    source: tuple[int, ...]
    targets: tuple[tuple[int, ...], ...]
    soft: tuple[tuple[SoftLabel, ...], ...] = ()
    """What a teacher gave every token of every target, to be learned in its place; empty: the tokens themselves."""
    places: tuple[int, ...] = ()
    """Where labels are read off, for tasks that label: places in the source. A target then is a label's number each."""
    condition: tuple[int, ...] = ()
    """Of the second text, where methods read one."""
    right: int = -1
    """Which of the targets is right, where these are choices; else -1."""
    num_before: int = 0
    """Tokens of the source that stand before these, read already and kept (see `antefix.training.kept_sources`)."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A data set as token ids, and what was cut."""

    examples: tuple[EncodedExample, ...]
    truncated_sources: int
    truncated_targets: int
    for_encoder: bool = False
    """Whether the sources go into an encoder, and the targets alone into the decoder."""

    are_choices: bool = False
    """Whether an example's targets are choices, which belong together and count as one pair."""
    num_draws: int = 1
    """So many epochs have examples of their own, equal shares one after the other; then the first comes again."""

    @property
    def num_pairs(self) -> int:
        """Source/target pairs, of all draws together."""
        return sum(self.pairs_in(len(e.targets)) for e in self.examples)

    @property
    def pairs_of_epoch(self) -> int:
        """Source/target pairs of one draw."""
        return self.num_pairs // self.num_draws  # draws are equal shares

    def of_epoch(self, epoch: int) -> range:
        """The examples of an epoch."""
        share = len(self.examples) // self.num_draws
        first = epoch % self.num_draws * share
        return range(first, first + share)

    def pairs_in(self, num_targets: int) -> int:
        """How many pairs so many targets of one example count as."""
        return min(num_targets, 1) if self.are_choices else num_targets


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How many tokens fit."""

    context: int | None
    """Tokens the base has positions for, slots with shifted positions taken off; None: no limit known."""
    condition: int | None = None
    """The most tokens of a second text, which every example must have; None: none is read."""
    inserted: int = 0
    """Padding tokens that end every source, for soft tokens to stand in."""
    target: int | None = None
    """Cut longer targets to this many tokens, the end token with them; None: one that does not fit is an error."""


def encode(
    examples: Sequence[Example],
    text_format: TextFormat,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    *,
    for_encoder: bool = False,
) -> Encoded:
    """Tokenise sources and targets apart.

    A source is cut as the text format says. Raises DataError naming the row where the text format cannot write a
    source, and where a pair does not fit into the context. What is cut is counted in the result, never silent.
    """
    encoded = []
    cut_sources = cut_targets = 0
    for example in examples:
        try:
            source, cut = text_format.encode_source_cut(tokenizer, example.source, for_encoder=for_encoder)
            cut_sources += cut
        except DataError as error:
            raise DataError(f"{where_of(example)}: {error}") from error
        if not source:
            raise DataError(f"{where_of(example)}: the source has no tokens: give it a separator (data.text.separator)")
        source = [*source, *[tokenizer.pad_token_id] * limits.inserted]
        targets = []
        for text in example.targets:
            target = text_format.encode_target(tokenizer, text)
            if limits.target is not None and len(target) > limits.target:
                target, cut_targets = target[: limits.target], cut_targets + 1
            targets.append(tuple(target))
        longest = max((len(t) for t in targets), default=0)
        _check_fits(example, len(source), longest, limits.context, for_encoder)
        condition = () if limits.condition is None else encode_condition(example, tokenizer, limits.condition)
        encoded.append(EncodedExample(tuple(source), tuple(targets), condition=condition))
    return Encoded(tuple(encoded), cut_sources, cut_targets, for_encoder)


def encode_condition(example: Example, tokenizer: PreTrainedTokenizerBase, longest: int) -> tuple[int, ...]:
    """Token ids of an example's second text. Raises DataError where it has none, or one that does not fit."""
    if example.condition is None:
        raise DataError(
            f"{where_of(example)}: this method reads a second text, and the example has none: name its column with "
            "data.reader.condition_column"
        )
    ids = tuple(tokenizer(example.condition, add_special_tokens=False)["input_ids"])
    if not 0 < len(ids) <= longest:
        raise DataError(
            f"{where_of(example)}: the second text has {len(ids)} tokens, it may have 1 to {longest}: shorten it, or "
            "set config.num_virtual_tokens higher"
        )
    return ids


def _check_fits(example: Example, source: int, target: int, context: int | None, for_encoder: bool) -> None:
    needed = max(source, target) if for_encoder else source + target
    if context is not None and needed > context:
        raise DataError(
            f"{where_of(example)}: {source} source and {target} target tokens do not fit into the base's context of "
            f"{context}; shorten it, or set data.max_source_tokens to have sources cut"
        )


def where_of(example: Example) -> str:
    """File and line of an example, as far as they are known."""
    return example.where or "an example"
