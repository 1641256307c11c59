"""METEOR 1.5 (Denkowski and Lavie 2014), English, as coco-caption gives it in tuetschek/e2e-metrics: the Java
program in pycocoevalcap with `-norm`, on texts of the PTB tokeniser, from 0 to 1.

The corpus figure is the program's own, made from the counts of all segments; it is not the mean of the segments'
scores. Resampled rows can only give that mean, so a bootstrap of METEOR is one of a slightly different figure.
Starting the program takes seconds and up to 2 GB of memory. An empty hypothesis scores 0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

from antefix.errors import MetricError
from antefix.metrics import tokens_ptb
from antefix.metrics.base import Evaluated, mean_from_sums, mean_of_segments

VERSION = f"meteor-1.5.1 (pycocoevalcap {version('pycocoevalcap')})"
NEEDS_JAVA = True
HIGHER_IS_BETTER = True
RESAMPLED = "differences of the means of the inputs' scores, not of the corpus figures"

tokenise = tokens_ptb.tokenise
from_sums = mean_from_sums
"""The mean of segments: near the corpus figure, not equal to it."""


def evaluate(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> Evaluated:
    """METEOR of a corpus of tokenised texts. Columns of the rows: the segment's score, and 1 to count by."""
    with program() as running:
        return evaluate_with(running, references, hypotheses)


@contextlib.contextmanager
def program() -> Iterator[Any]:
    """The running METEOR program, ended with the block: start it once to score several corpora."""
    from pycocoevalcap.meteor.meteor import Meteor

    scorer = Meteor()
    try:
        yield scorer
    finally:
        _end(scorer)


def evaluate_with(running: Any, references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> Evaluated:
    """As `evaluate`, by a program that runs. Raises MetricError where it fails."""
    groups = {n: list(group) for n, group in enumerate(references)}
    texts = {n: [text] for n, text in enumerate(hypotheses)}
    try:
        corpus, segments = running.compute_score(groups, texts)
    except (OSError, ValueError) as error:
        raise MetricError(f"METEOR's Java program failed ({error}); it needs 2 GB of memory") from error
    return Evaluated(float(corpus), mean_of_segments(segments))


def _end(scorer: Any) -> None:
    """End the program, and free the lock that pycocoevalcap's class leaves held after a failure: its `__del__`
    would wait for it for ever."""
    process = scorer.meteor_p
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        with contextlib.suppress(OSError):
            pipe.close()
    if scorer.lock.locked():
        scorer.lock.release()
