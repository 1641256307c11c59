"""The task of telling true triples from false ones: their texts, and false ones to learn from.

A data set holds true triples. False ones are drawn: a triple with another head, another relation or another tail, that
is not in the same file (it may be true by another one: so does PALT's released code, Shen et al. 2022, arXiv
2210.13715). Entities and relations are told apart by their texts. Knows examples and tokenizers, nothing of models.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from antefix.data.encode import where_of
from antefix.data.example import Example, Source, Triples
from antefix.data.linearise import TextFormat
from antefix.errors import DataError
from antefix.tasks.label import LabelTask, at_one_place

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRUE, FALSE = "true", "false"
"""The labels."""

Triple = tuple[str, str, str]
"""Head, relation, tail, as texts."""
HEAD, RELATION, TAIL = range(3)


class TriplesTask(LabelTask):
    """One of two labels a triple, read off an encoder's first token or a decoder's last one."""

    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)
    draws_negatives: ClassVar[bool] = True

    name: Literal["triples"] = "triples"

    @classmethod
    def of(cls, examples: Sequence[Example], *, length_norm: float = 1.0) -> Self:
        return cls(labels=(TRUE, FALSE))

    def encoder(
        self, text_format: TextFormat, tokenizer: PreTrainedTokenizerBase, *, for_encoder: bool
    ) -> Callable[[Source], tuple[list[int], list[int], bool]]:
        write = TripleEncoder(text_format, tokenizer, for_encoder=for_encoder)
        return at_one_place(write, for_encoder=for_encoder)

    @classmethod
    def with_negatives(
        cls, examples: Sequence[Example], negatives: int, seed: int, num_draws: int = 1
    ) -> Sequence[Example]:
        return with_negatives(examples, negatives, seed, num_draws)

    @classmethod
    def scored_in_test(cls, test: Sequence[Example], others: Sequence[Example], seed: int) -> Sequence[Example]:
        return with_one_negative(test, set(true_triples([*others, *test])), seed)

    def scored_in_training(
        self, train: Sequence[Example], dev: Sequence[Example], count: int, seed: int
    ) -> Sequence[Example]:
        """Half of them true, so that it does not pay to call all of them false."""
        true = [e for e in dev if is_true(e)][: max(1, count // 2)]
        return with_one_negative(true, set(true_triples([*train, *dev])), seed)


def triple_of(example: Example) -> Triple:
    """The triple of an example. Raises DataError where it has none, or several."""
    if not isinstance(example.source, Triples) or len(example.source.triples) != 1:
        raise DataError(f"{where_of(example)}: triples are needed, one a row (see docs/data.md)")
    return example.source.triples[0]


def is_true(example: Example) -> bool:
    """Whether an example says that its triple is true; one that says nothing does."""
    return example.targets in ((), (TRUE,))


def true_triples(examples: Iterable[Example]) -> list[Triple]:
    """Those of a data set, in its order."""
    return [triple_of(e) for e in examples if is_true(e)]


def entities_of(triples: Iterable[Triple]) -> list[str]:
    """All heads and tails, each once, in order."""
    return sorted({entity for head, _, tail in triples for entity in (head, tail)})


def corrupted(triple: Triple, place: int, others: Sequence[str], known: Collection[Triple], draw: random.Random) -> (
    Triple | None
):  # fmt: skip
    """The triple with another one at a place, not a known one; None: there is none. Each is as likely as the next."""

    def with_other(other: str) -> Triple:
        head, relation, tail = (other if n == place else part for n, part in enumerate(triple))
        return head, relation, tail

    # Most graphs are sparse: all others are only looked through where the first one drawn is known.
    if others and (first := with_other(draw.choice(others))) not in known:
        return first
    unknown = [made for other in others if (made := with_other(other)) not in known]
    return draw.choice(unknown) if unknown else None


def with_negatives(examples: Sequence[Example], negatives: int, seed: int, num_draws: int = 1) -> list[Example]:
    """Every example, and after a true triple as many false ones for each of its three places; this `num_draws` times.

    Every draw has the same examples and other false triples: an epoch takes one (see `Encoded.num_draws`). Raises
    DataError for an example that is no triple.
    """
    known = set(true_triples(examples))
    entities, relations = entities_of(known), sorted({relation for _, relation, _ in known})
    draw = random.Random(f"negatives-{seed}")
    made: list[Example] = []
    for example in [e for _ in range(num_draws) for e in examples]:
        triple = triple_of(example)
        made.append(example if example.targets else replace(example, targets=(TRUE,)))
        if not is_true(example):
            continue
        for place, others in ((HEAD, entities), (RELATION, relations), (TAIL, entities)):
            for _ in range(negatives):
                if (false := corrupted(triple, place, others, known, draw)) is not None:
                    made.append(replace(example, source=Triples((false,)), targets=(FALSE,)))
    return made


def with_one_negative(examples: Sequence[Example], known: Collection[Triple], seed: int) -> list[Example]:
    """A set to classify: as it is where it says what is false, else with a false triple for every true one.

    Of a false one head or tail, drawn by the seed, is another entity's, so that no known triple comes of it.
    """
    if not all(is_true(example) for example in examples):
        return list(examples)
    entities, draw = entities_of(known), random.Random(f"classify-{seed}")
    made = list(examples)
    for example in examples:
        if (false := corrupted(triple_of(example), draw.choice((HEAD, TAIL)), entities, known, draw)) is not None:
            made.append(replace(example, source=Triples((false,)), targets=(FALSE,)))
    return made


class TripleEncoder:
    """Triples as token ids, by one text format and tokenizer. A graph has few texts: each is tokenised once.

    An encoder gets a pair of texts, head and relation before its tail, each with what the text format puts around it;
    other bases get them as one text. Of triples longer than `max_source_tokens` the longer text is cut, token by token;
    what stands around is not counted.
    """

    def __init__(self, text_format: TextFormat, tokenizer: PreTrainedTokenizerBase, *, for_encoder: bool) -> None:
        self._format, self._tokenizer, self._for_encoder = text_format, tokenizer, for_encoder
        self._ids = cache(self._tokenised)
        self._around = tuple(_around_pairs(tokenizer)) if for_encoder else ()

    def __call__(self, source: Source) -> tuple[list[int], bool]:
        """Token ids, and whether the triple was cut. Raises DataError for what is no triple."""
        if not isinstance(source, Triples) or len(source.triples) != 1:
            raise DataError("a single triple is needed")
        head, relation, tail = source.triples[0]
        made = self._format
        if not self._for_encoder:
            text = f"{head} {relation}{made.separator}{tail}{made.after_target}"
            return made.model_copy(update={"linearise": "plain"}).encode_source_cut(self._tokenizer, text)
        first, second = list(self._ids(f"{head} {relation}")), list(self._ids(tail))
        cut = False
        while made.max_source_tokens is not None and len(first) + len(second) > made.max_source_tokens:
            (first if len(first) >= len(second) else second).pop()
            cut = True
        first = [*self._ids(made.instruction + made.before_source), *first, *self._ids(made.separator.strip())]
        second = [*self._ids(made.before_target), *second, *self._ids(made.after_target)]
        opening, between, closing = self._around
        return [*opening, *first, *between, *second, *closing], cut

    def _tokenised(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()


def _around_pairs(tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """The tokenizer's own tokens before, between and after two texts, seen on a pair."""
    found = tokenizer("a", "a")
    ids, text_of = list(found["input_ids"]), found.sequence_ids(0)
    ends = len(text_of) - 1 - text_of[::-1].index(0), len(text_of) - 1 - text_of[::-1].index(1)
    yield ids[: text_of.index(0)]
    yield ids[ends[0] + 1 : text_of.index(1)]
    yield ids[ends[1] + 1 :]
