"""What every metric offers, so that scoring and the bootstrap know none of them by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Evaluated:
    """One system's score by one metric."""

    score: float
    """The corpus figure, as the official scorer prints it."""
    rows: Rows
    """(segments, columns): what every segment adds. The metric's `from_sums` scores a sum of rows, so a resampled
    corpus costs one matrix product."""


class Metric(Protocol):
    """A module of this package. Texts reach `evaluate` as tokens joined by one space, made by its `tokenise`."""

    VERSION: str
    """Figures of unlike versions are not to be compared."""
    NEEDS_JAVA: bool
    HIGHER_IS_BETTER: bool
    RESAMPLED: str
    """In what the bootstrap of this score differs from scoring every draw anew; empty where it does not."""

    def tokenise(self, texts: Sequence[str]) -> list[str]:
        """One line of tokens for every text. Texts hold no line break."""

    def evaluate(self, references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> Evaluated:
        """Score tokenised texts: one hypothesis for every group of one or more references."""

    def from_sums(self, sums: Rows) -> float:
        """The corpus score of summed rows, (columns,)."""


def mean_of_segments(scores: Sequence[float]) -> Rows:
    """Rows for a metric that is a mean over segments: the score, and 1 to count by."""
    return np.column_stack([np.asarray(scores, dtype=np.float64), np.ones(len(scores))])


def mean_from_sums(sums: Rows) -> float:
    """The mean that rows of `mean_of_segments` add up to."""
    return float(sums[0] / sums[1])
