"""Scores of texts against references. Knows nothing of prefixes or models.

`score` gives the five figures of the E2E challenge's official scorer (tuetschek/e2e-metrics, commit 1b9c4d8) to
the last printed digit. A new metric is a file that follows `base.Metric`, and a line in `METRICS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, cast

from antefix.errors import MetricError, nearest

if TYPE_CHECKING:
    from antefix.metrics.base import Evaluated, Metric

METRICS: dict[str, str] = {
    "bleu": "antefix.metrics.bleu",
    "nist": "antefix.metrics.nist",
    "meteor": "antefix.metrics.meteor",
    "rouge_l": "antefix.metrics.rouge_l",
    "cider": "antefix.metrics.cider",
    "rouge_l_13a": "antefix.metrics.rouge_l_13a",
    "rouge_1": "antefix.metrics.rouge_1",
    "rouge_2": "antefix.metrics.rouge_2",
    "rouge_l_f1": "antefix.metrics.rouge_l_f1",
    "chrf": "antefix.metrics.chrf",
    "ter": "antefix.metrics.ter",
    "bleu_webnlg": "antefix.metrics.bleu_webnlg",
    "meteor_webnlg": "antefix.metrics.meteor_webnlg",
    "ter_webnlg": "antefix.metrics.ter_webnlg",
    "bleu_dart": "antefix.metrics.bleu_dart",
    "accuracy": "antefix.metrics.accuracy",
    "well_formed": "antefix.metrics.well_formed",
    "frame_f1": "antefix.metrics.frame_f1",
    "word_accuracy": "antefix.metrics.word_accuracy",
    "span_f1": "antefix.metrics.span_f1",
}
"""Name -> module, imported when asked for. METEOR, `rouge_l` and CIDEr need Java, for their tokeniser."""
E2E_METRICS = ("bleu", "nist", "meteor", "rouge_l", "cider")
"""Those of the E2E challenge's official scorer."""
RESAMPLES = 1000
"""Draws of a bootstrap, unless another number is asked for."""

_LINE_BREAKS = re.compile("[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]+")


def score(
    references: Sequence[Sequence[str]], hypotheses: Sequence[str], metrics: Sequence[str] = E2E_METRICS
) -> dict[str, float]:
    """The corpus score by every metric named, as the E2E challenge's scorer gives it (BLEU from 0 to 1).

    references: one or more texts for every hypothesis. An empty hypothesis is scored; an empty reference is not.
    Raises MetricError: an unknown metric, unequal counts, nothing to score, an input without a (non-empty)
    reference, no Java for a metric that needs it.
    """
    return {name: e.score for name, e in evaluate(references, hypotheses, metrics).items()}


def evaluate(
    references: Sequence[Sequence[str]], hypotheses: Sequence[str], metrics: Sequence[str] = E2E_METRICS
) -> dict[str, Evaluated]:
    """As `score`, with what every segment adds to the figure: the input of the bootstrap."""
    modules = {name: load(name) for name in metrics}
    _check_counts(references, hypotheses)
    check_java([name for name, module in modules.items() if module.NEEDS_JAVA])
    groups = [[_clean(text) for text in group] for group in references]
    texts = [_clean(text) for text in hypotheses]
    _check_references(groups)
    tokenised = {make: _tokenised(make, groups, texts) for make in {m.tokenise for m in modules.values()}}
    return {name: module.evaluate(*tokenised[module.tokenise]) for name, module in modules.items()}


def load(name: str) -> Metric:
    """The module of a metric. Raises MetricError for a name that `METRICS` has not."""
    if name not in METRICS:
        raise MetricError(f"unknown metric '{name}': {nearest(name, METRICS)}")
    return cast("Metric", import_module(METRICS[name]))


def check_java(names: Sequence[str]) -> None:
    """Raises MetricError if these metrics need Java (`load(name).NEEDS_JAVA`) and there is none."""
    from antefix.metrics.tokens_ptb import have_java

    if names and not have_java():
        raise MetricError(
            f"{', '.join(names)}: needs Java, and no 'java' is on the PATH; install a Java runtime (8 or newer) or "
            "leave these metrics out"
        )


def _tokenised(
    make: Callable[[Sequence[str]], list[str]], references: Sequence[Sequence[str]], hypotheses: Sequence[str]
) -> tuple[list[list[str]], list[str]]:
    """Every text through a tokeniser in one call: the Java one takes longer to start than to run."""
    made = iter(make([*hypotheses, *(text for group in references for text in group)]))
    texts = [next(made) for _ in hypotheses]
    return [[next(made) for _ in group] for group in references], texts


def _clean(text: str) -> str:
    """What the official scorer would read from a line of a file."""
    return _LINE_BREAKS.sub(" ", text).strip()


def _check_counts(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> None:
    if len(references) != len(hypotheses):
        raise MetricError(
            f"{len(hypotheses)} hypotheses for {len(references)} inputs: one hypothesis for every input is needed"
        )
    if not hypotheses:
        raise MetricError("nothing to score: there are no hypotheses")


def _check_references(groups: Sequence[Sequence[str]]) -> None:
    for number, group in enumerate(groups, start=1):
        if not group:
            raise MetricError(f"input {number} has no reference")
        if not all(group):
            raise MetricError(f"input {number}: reference {group.index('') + 1} is empty")
