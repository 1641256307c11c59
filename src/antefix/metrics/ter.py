"""TER (Snover et al. 2006): edits and shifts for every word of the mean reference, from 0; less is better.

sacrebleu counts, with tercom's default options: not normalised, case-insensitive. It differs from tercom by an edit in
several hundred segments, and takes seconds for every hundred.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import sacrebleu

from antefix.metrics import accuracy
from antefix.metrics.base import Evaluated, Rows

VERSION = f"tercom.1 (sacrebleu {sacrebleu.__version__})"
NEEDS_JAVA = False
HIGHER_IS_BETTER = False
RESAMPLED = ""

tokenise = accuracy.tokenise


def evaluate(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> Evaluated:
    """TER of a corpus of texts. Columns of the rows: edits of the nearest reference, the references' mean length."""
    counter = sacrebleu.TER()
    counted = [counter.sentence_score(text, list(group)) for group, text in zip(references, hypotheses, strict=True)]
    rows = np.array([(found.num_edits, found.ref_length) for found in counted], dtype=np.float64)
    return Evaluated(from_sums(rows.sum(axis=0)), rows)


def from_sums(sums: Rows) -> float:
    """The corpus score of summed rows; 1 for texts without any reference word."""
    edits, length = sums
    return float(edits / length) if length > 0 else float(edits > 0)
