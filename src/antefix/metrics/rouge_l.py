"""ROUGE-L (Lin 2004) as coco-caption gives it in tuetschek/e2e-metrics: pycocoevalcap's class on texts of the PTB
tokeniser; the mean over segments, from 0 to 1.

Precision and recall are each the best over the references, on their own; beta is 1.2. This is not the rougeL of
the `rouge-score` package. An empty hypothesis scores 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

from antefix.metrics import tokens_ptb
from antefix.metrics.base import Evaluated, mean_from_sums, mean_of_segments

VERSION = f"coco.1 (pycocoevalcap {version('pycocoevalcap')})"
NEEDS_JAVA = True
HIGHER_IS_BETTER = True
RESAMPLED = ""

tokenise = tokens_ptb.tokenise
from_sums = mean_from_sums


def evaluate(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> Evaluated:
    """ROUGE-L of a corpus of tokenised texts. Columns of the rows: the segment's score, and 1 to count by."""
    from pycocoevalcap.rouge.rouge import Rouge

    groups = {n: list(group) for n, group in enumerate(references)}
    texts = {n: [text] for n, text in enumerate(hypotheses)}
    corpus, segments = Rouge().compute_score(groups, texts)
    return Evaluated(float(corpus), mean_of_segments(segments))
