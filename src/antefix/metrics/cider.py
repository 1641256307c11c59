"""CIDEr (Vedantam et al. 2015) as coco-caption gives it in tuetschek/e2e-metrics: pycocoevalcap's class, which
computes the CIDEr-D kind, on texts of the PTB tokeniser; the mean over segments, from 0 to 10.

An n-gram weighs by how few inputs of this set have it in their references. So one input alone always scores 0, and
figures of sets of unlike size are not comparable. An empty hypothesis scores 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

from antefix.metrics import tokens_ptb
from antefix.metrics.base import Evaluated, mean_from_sums, mean_of_segments

VERSION = f"coco.1 (pycocoevalcap {version('pycocoevalcap')})"
NEEDS_JAVA = True
HIGHER_IS_BETTER = True
RESAMPLED = "every draw keeps the n-gram weights of the whole set"

tokenise = tokens_ptb.tokenise
from_sums = mean_from_sums


def evaluate(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> Evaluated:
    """CIDEr of a corpus of tokenised texts.

    Columns of the rows: the segment's score, and 1 to count by. Resampled rows keep the weights of the whole set.
    """
    from pycocoevalcap.cider.cider import Cider

    if not any(text for group in references for text in group):  # only punctuation, which the tokeniser drops
        return Evaluated(0.0, mean_of_segments([0.0] * len(hypotheses)))
    groups = {n: list(group) for n, group in enumerate(references)}
    texts = {n: [text] for n, text in enumerate(hypotheses)}
    corpus, segments = Cider().compute_score(groups, texts)
    return Evaluated(float(corpus), mean_of_segments(segments))
