"""TER as WebNLG's official script gives it, up to what `ter` says: on its preparation, the first three references."""

from __future__ import annotations

from collections.abc import Sequence

from antefix.metrics import bleu_webnlg, ter, tokens_webnlg
from antefix.metrics.base import Evaluated

VERSION = f"webnlg.1 of {ter.VERSION}"
NEEDS_JAVA = False
HIGHER_IS_BETTER = False
RESAMPLED = ""

tokenise = tokens_webnlg.tokenise
from_sums = ter.from_sums


def evaluate(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> Evaluated:
    """TER of a corpus of prepared texts. Columns of the rows: those of `ter`."""
    return ter.evaluate([group[: bleu_webnlg.REFERENCES] for group in references], hypotheses)
