"""chrF (Popović 2015) as sacrebleu gives it: F of character n-grams up to order 6, beta 2, white space left out, the
best reference of every segment; from 0 to 100.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import sacrebleu

from antefix.metrics import accuracy
from antefix.metrics.base import Evaluated, Rows

VERSION = f"chrF2.1 (sacrebleu {sacrebleu.__version__})"
NEEDS_JAVA = False
HIGHER_IS_BETTER = True
RESAMPLED = ""
_COUNTER = sacrebleu.CHRF()

tokenise = accuracy.tokenise


def evaluate(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> Evaluated:
    """chrF of a corpus. Columns of the rows: n-grams of hypothesis and reference, and matches, by order."""
    groups = zip(references, hypotheses, strict=True)
    rows = np.array(
        [_COUNTER._extract_corpus_statistics([text], [[r] for r in group])[0] for group, text in groups], dtype=float
    )
    return Evaluated(from_sums(rows.sum(axis=0)), rows)


def from_sums(sums: Rows) -> float:
    """The corpus score of summed rows."""
    return float(_COUNTER._compute_score_from_stats([round(n) for n in sums]).score)
