"""Span F1, as conlleval counts it: a span is right where its ends and its kind are.

Tags are B-kind, I-kind and O. An I- that continues no span of its kind begins one, as in conlleval.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from antefix.metrics.accuracy import tokenise
from antefix.metrics.base import Evaluated, Rows
from antefix.metrics.word_accuracy import tag_pairs

VERSION = "conlleval.1"
NEEDS_JAVA = False
HIGHER_IS_BETTER = True
RESAMPLED = ""

__all__ = ["HIGHER_IS_BETTER", "NEEDS_JAVA", "RESAMPLED", "VERSION", "evaluate", "from_sums", "spans", "tokenise"]


def evaluate(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> Evaluated:
    """Micro-averaged over all texts; 0 where there is no span at all."""
    counts = []
    for wanted, found in tag_pairs(references, hypotheses):
        right, gold = spans(found), spans(wanted)
        counts.append([len(right & gold), len(right), len(gold)])
    rows: Rows = np.array(counts, dtype=np.float64)
    return Evaluated(from_sums(rows.sum(axis=0)), rows)


def from_sums(sums: Rows) -> float:
    """2 right / (found + wanted)."""
    right, found, wanted = sums
    return float(2 * right / (found + wanted)) if found + wanted else 0.0


def spans(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """(first word, word after the last, kind)."""
    found, start, kind = set(), 0, ""
    for place, tag in enumerate([*tags, "O"]):
        mark, _, own = tag.partition("-")
        if kind and (mark != "I" or own != kind):
            found.add((start, place, kind))
            kind = ""
        if mark in ("B", "I") and not kind:
            start, kind = place, own
    return found
