"""F1 of the labelled brackets of TOP's frames: a label and the words that it covers, by their numbers; from 0 to 1.

A text that is no well-formed frame has no brackets. Of several references the first counts. Exact match is `accuracy`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from antefix.data.frames import brackets, parse
from antefix.metrics import accuracy
from antefix.metrics.base import Evaluated, Rows

VERSION = "1"
NEEDS_JAVA = False
HIGHER_IS_BETTER = True
RESAMPLED = ""

tokenise = accuracy.tokenise


def evaluate(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> Evaluated:
    """Of a corpus. Columns of the rows: brackets that are right, of the text, of the reference."""
    pairs = [(_brackets(text), _brackets(group[0])) for group, text in zip(references, hypotheses, strict=True)]
    rows = np.array([((of_text & wanted).total(), of_text.total(), wanted.total()) for of_text, wanted in pairs], float)
    return Evaluated(from_sums(rows.sum(axis=0)), rows)


def from_sums(sums: Rows) -> float:
    """2 right / (given + wanted); 0 where there are none."""
    right, given, wanted = sums
    return float(2 * right / (given + wanted)) if given + wanted > 0 else 0.0


def _brackets(text: str) -> Counter[tuple[str, int, int]]:
    root = parse(text)
    return Counter() if root is None else Counter(brackets(root))
