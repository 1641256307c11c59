"""What a graph is missing, from a prefix that was trained to tell true triples from false ones (`task = "triples"`).

Link prediction ranks a true triple among those with every other entity as its head, and as its tail; others that are
known to be true are left out (the filtered setting). Triple classification takes what is likelier than a threshold,
which is chosen on a dev set, for true.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch

from antefix.base import Base
from antefix.data.example import Example, Triples
from antefix.data.linearise import TextFormat
from antefix.errors import DataError
from antefix.labels import scores_each
from antefix.metrics.ranks import rank, rank_scores
from antefix.tasks import LabelTask
from antefix.tasks.triples import (
    HEAD,
    TAIL,
    TRUE,
    Triple,
    entities_of,
    is_true,
    triple_of,
    true_triples,
)

THRESHOLDS = 1000
"""Steps of the grid between 0 and 1 that a threshold is chosen from, as PALT's released code does."""
_TRIPLES_AT_ONCE = 32
"""How many triples are ranked together, so that texts of like lengths share a batch."""

Likelihood = Callable[[Sequence[Triple]], Sequence[float]]
"""How likely triples are to be true, from 0 to 1."""


def likelihoods(
    base: Base,
    triples: Sequence[Triple],
    *,
    task: LabelTask | None = None,
    text_format: TextFormat | None = None,
    batch_size: int = 128,
) -> list[float]:
    """The probability that each triple is true, by the head of what is attached. See `antefix.labels.label`."""
    found = [0.0] * len(triples)
    sources = [Triples((triple,)) for triple in triples]
    for n, labels, scores in scores_each(base, sources, task=task, text_format=text_format, batch_size=batch_size):
        found[n] = float(torch.softmax(scores[0].float(), dim=-1)[labels.labels.index(TRUE)])
    return found


def link_ranks(
    likelihood: Likelihood,
    triples: Sequence[Triple],
    entities: Sequence[str],
    known: Collection[Triple],
    on_done: Callable[[int], None] = lambda count: None,
) -> list[float]:
    """Two ranks a triple, for its head and for its tail, among the entities that do not make a known triple.

    known: all true triples, of the training and dev set too. on_done: told how many triples are ranked.
    """
    known, ranks = set(known), list[float]()
    for start in range(0, len(triples), _TRIPLES_AT_ONCE):
        queries = [
            [triple, *(other for other in _others(triple, place, entities) if other not in known)]
            for triple in triples[start : start + _TRIPLES_AT_ONCE]
            for place in (HEAD, TAIL)
        ]
        # A triple that several ask for is scored once, so that equals stay equal.
        asked = list(dict.fromkeys(triple for query in queries for triple in query))
        score = dict(zip(asked, likelihood(asked), strict=True))
        ranks += [rank(score[query[0]], [score[other] for other in query[1:]]) for query in queries]
        on_done(min(start + _TRIPLES_AT_ONCE, len(triples)))
    return ranks


def _others(triple: Triple, place: int, entities: Sequence[str]) -> list[Triple]:
    head, relation, tail = triple
    if place == HEAD:
        return [(other, relation, tail) for other in entities if other != head]
    return [(head, relation, other) for other in entities if other != tail]


def link_scores(
    likelihood: Likelihood,
    test: Sequence[Example],
    known: Sequence[Example],
    on_done: Callable[[int], None] = lambda count: None,
) -> dict[str, float]:
    """Filtered MR, MRR and Hits@1, 3 and 10 over the heads and tails of the true triples of a test set.

    known: the training and dev set. Raises DataError where there is nothing to rank.
    """
    triples = true_triples(test)
    if not triples:
        raise DataError("the test set holds no true triple that could be ranked")
    every = [*true_triples(known), *triples]
    return rank_scores(link_ranks(likelihood, triples, entities_of(every), set(every), on_done))


def classification_scores(likelihood: Likelihood, dev: Sequence[Example], test: Sequence[Example]) -> dict[str, float]:
    """The accuracy on a test set, with the threshold of the grid that is best on the dev set, the lowest of equals.

    Raises DataError where there is nothing to classify.
    """
    if not dev or not test:
        raise DataError(f"the {'test' if dev else 'dev'} set holds no triple that could be classified")
    on_dev, on_test = (([is_true(e) for e in some], likelihood([triple_of(e) for e in some])) for some in (dev, test))
    grid = [n / THRESHOLDS for n in range(THRESHOLDS + 1)]
    best = max(grid, key=lambda threshold: _accuracy(*on_dev, threshold))
    return {"threshold": best, "dev_accuracy": _accuracy(*on_dev, best), "accuracy": _accuracy(*on_test, best)}


def _accuracy(truths: Sequence[bool], scores: Sequence[float], threshold: float) -> float:
    right = sum((score >= threshold) == truth for truth, score in zip(truths, scores, strict=True))
    return right / len(truths)
