"""BLEU (Papineni et al. 2002) as mteval-v13a.pl gives it in tuetschek/e2e-metrics: corpus level, orders 1-4,
case-insensitive for A-Z, the closest reference length (the shorter of two), from 0 to 1.

sacrebleu counts. The score is made here, because the script smooths two degenerate corpora to which sacrebleu
gives 0: one where nothing matches, and one where no hypothesis is long enough to have an n-gram of some order.

An empty hypothesis has no n-gram; if all are empty, the score is 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import sacrebleu

from antefix.metrics import tokens_13a
from antefix.metrics.base import Evaluated, Rows

VERSION = f"mteval13a.1 (sacrebleu {sacrebleu.__version__})"
NEEDS_JAVA = False
HIGHER_IS_BETTER = True
RESAMPLED = ""
ORDERS = 4

tokenise = tokens_13a.tokenise


def evaluate(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> Evaluated:
    """BLEU of a corpus of tokenised texts.

    Columns of the rows: tokens of the hypothesis, tokens of the closest reference, clipped matches of order 1 to
    4, n-grams of the hypothesis of order 1 to 4.
    """
    counter = sacrebleu.BLEU(tokenize="none")
    rows = np.array([_row(counter, group, text) for group, text in zip(references, hypotheses, strict=True)])
    return Evaluated(from_sums(rows.sum(axis=0)), rows)


def from_sums(sums: Rows) -> float:
    """The corpus score of summed rows."""
    hypothesis_tokens, reference_tokens = sums[:2]
    if hypothesis_tokens == 0:
        return 0.0
    log_brevity = min(0.0, 1 - reference_tokens / hypothesis_tokens)
    log_precision, orders_without_match = 0.0, 0
    for matches, total in zip(sums[2 : 2 + ORDERS], sums[2 + ORDERS :], strict=True):
        if total == 0:
            continue
        if matches == 0:
            orders_without_match += 1
            log_precision -= math.log(2**orders_without_match * total)
        else:
            log_precision += math.log(matches / total)
    return math.exp(log_brevity + log_precision / ORDERS)


def _row(counter: sacrebleu.BLEU, references: Sequence[str], hypothesis: str) -> Rows:
    counted = counter.corpus_score([hypothesis], [[text] for text in references])
    return np.array([counted.sys_len, counted.ref_len, *counted.counts, *counted.totals], dtype=np.float64)
