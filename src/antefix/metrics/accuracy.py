"""Accuracy: the share of texts that equal one of their references, as labels do, whatever their white space."""

from __future__ import annotations

from collections.abc import Sequence

from antefix.metrics.base import Evaluated, mean_from_sums, mean_of_segments

VERSION = "1"
NEEDS_JAVA = False
HIGHER_IS_BETTER = True
RESAMPLED = ""

from_sums = mean_from_sums


def tokenise(texts: Sequence[str]) -> list[str]:
    """Texts as they are, with single spaces."""
    return [" ".join(text.split()) for text in texts]


def evaluate(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> Evaluated:
    """The share of hypotheses among their references."""
    right = [float(text in group) for group, text in zip(references, hypotheses, strict=True)]
    return Evaluated(sum(right) / len(right), mean_of_segments(right))
