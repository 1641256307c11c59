"""Word accuracy: the share of words whose tag is right. A text is its words' tags, separated by spaces."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from antefix.errors import MetricError
from antefix.metrics.accuracy import tokenise
from antefix.metrics.base import Evaluated, Rows, mean_from_sums

VERSION = "1"
NEEDS_JAVA = False
HIGHER_IS_BETTER = True
RESAMPLED = ""

from_sums = mean_from_sums

__all__ = ["HIGHER_IS_BETTER", "NEEDS_JAVA", "RESAMPLED", "VERSION", "evaluate", "from_sums", "tag_pairs", "tokenise"]


def evaluate(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> Evaluated:
    """Over all words of all texts."""
    pairs = tag_pairs(references, hypotheses)
    rows: Rows = np.array([[sum(a == b for a, b in zip(*pair, strict=True)), len(pair[0])] for pair in pairs], float)
    return Evaluated(mean_from_sums(rows.sum(axis=0)), rows)


def tag_pairs(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> list[tuple[list[str], list[str]]]:
    """The tags of every text and of its (first) reference. Raises MetricError for unequal numbers of words."""
    pairs = [(group[0].split(), text.split()) for group, text in zip(references, hypotheses, strict=True)]
    for number, (wanted, found) in enumerate(pairs, start=1):
        if len(wanted) != len(found):
            raise MetricError(
                f"input {number} has {len(wanted)} tags, its hypothesis {len(found)}: one a word is needed"
            )
    return pairs
