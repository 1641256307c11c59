"""METEOR as WebNLG's official script gives it: the program of `meteor` on its preparation, three references; 0 to 1."""

from __future__ import annotations

from collections.abc import Sequence

from antefix.metrics import bleu_webnlg, meteor, tokens_webnlg
from antefix.metrics.base import Evaluated

VERSION = f"webnlg.1 of {meteor.VERSION}"
NEEDS_JAVA = True
HIGHER_IS_BETTER = True
RESAMPLED = meteor.RESAMPLED

tokenise = tokens_webnlg.tokenise
from_sums = meteor.from_sums


def evaluate(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> Evaluated:
    """METEOR of a corpus of prepared texts. Columns of the rows: the segment's score, and 1 to count by."""
    return meteor.evaluate([group[: bleu_webnlg.REFERENCES] for group in references], hypotheses)
