"""What ROUGE-1, ROUGE-2 and the summary kind of ROUGE-L share: the `rouge-score` package, without stemming.

F1 of the best reference, the mean over segments, from 0 to 1. The package tokenises for itself: letters and digits,
lowercased. An empty text scores 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from antefix.errors import MetricError
from antefix.metrics.base import Evaluated, mean_of_segments

try:
    VERSION = f"1 (rouge-score {version('rouge-score')})"
except PackageNotFoundError as error:
    raise MetricError("ROUGE of summaries needs rouge-score: pip install 'antefix[rouge]'") from error


def evaluate(kind: str, references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> Evaluated:
    """kind: `rouge1`, `rouge2` or `rougeL`. Columns of the rows: the segment's score, and 1 to count by."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([kind])
    groups = zip(references, hypotheses, strict=True)
    scores = [scorer.score_multi(list(group), text)[kind].fmeasure for group, text in groups]
    return Evaluated(sum(scores) / len(scores), mean_of_segments(scores))
