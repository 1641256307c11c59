"""ROUGE-2 (Lin 2004), pairs of words, as summaries are scored: see `rouge_score_package`."""

from __future__ import annotations

from functools import partial

from antefix.metrics import accuracy, rouge_score_package
from antefix.metrics.base import mean_from_sums

VERSION = rouge_score_package.VERSION
NEEDS_JAVA = False
HIGHER_IS_BETTER = True
RESAMPLED = ""

tokenise = accuracy.tokenise
evaluate = partial(rouge_score_package.evaluate, "rouge2")
from_sums = mean_from_sums
