"""BLEU as WebNLG's official script gives it: multi-bleu.perl on its preparation, the first three references; 0 to 1.

multi-bleu does not smooth: a corpus without a match of some order scores 0.
"""

from __future__ import annotations

from collections.abc import Sequence

from antefix.metrics import bleu, tokens_webnlg
from antefix.metrics.base import Evaluated, Rows

VERSION = f"multi-bleu.1 of {bleu.VERSION}"
NEEDS_JAVA = False
HIGHER_IS_BETTER = True
RESAMPLED = ""
REFERENCES = 3
"""The most that the scripts of WebNLG and DART read."""

tokenise = tokens_webnlg.tokenise


def evaluate(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> Evaluated:
    """BLEU of a corpus of prepared texts. Columns of the rows: those of `bleu`."""
    counted = bleu.evaluate([group[:REFERENCES] for group in references], hypotheses)
    return Evaluated(from_sums(counted.rows.sum(axis=0)), counted.rows)


def from_sums(sums: Rows) -> float:
    """The corpus score of summed rows."""
    return bleu.from_sums(sums) if (sums[2 : 2 + bleu.ORDERS] > 0).all() else 0.0
