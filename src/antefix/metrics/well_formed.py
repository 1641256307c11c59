"""The share of texts that are well-formed frames of TOP, whatever the references; from 0 to 1."""

from __future__ import annotations

from collections.abc import Sequence

from antefix.data.frames import parse
from antefix.metrics import accuracy
from antefix.metrics.base import Evaluated, mean_from_sums, mean_of_segments

VERSION = "1"
NEEDS_JAVA = False
HIGHER_IS_BETTER = True
RESAMPLED = ""

tokenise = accuracy.tokenise
from_sums = mean_from_sums


def evaluate(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> Evaluated:
    """Of a corpus. Columns of the rows: whether the text is one, and 1 to count by."""
    found = [float(parse(text) is not None) for text in hypotheses]
    return Evaluated(sum(found) / len(found), mean_of_segments(found))
