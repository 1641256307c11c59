"""Is one system better than another? The paired bootstrap over inputs (Koehn 2004).

Inputs are drawn with replacement and both systems are scored on the same draw; the differences over many draws
show how far the measured difference depends on which inputs happened to be in the set.

BLEU and NIST are computed anew from counts on every draw, ROUGE-L and CIDEr are means over the inputs drawn. The
n-gram weights of NIST and CIDEr stay those of the whole set. METEOR's corpus figure comes out of its Java program
alone, so here it is the mean of the inputs' scores: `Comparison.note` says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from antefix.errors import MetricError
from antefix.metrics import E2E_METRICS, evaluate, load
from antefix.metrics.base import Evaluated, Rows

VERSION = "paired-bootstrap.1"
RESAMPLES = 1000
METEOR_NOTE = "difference of the means of the inputs' scores, not of the corpus figures"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How a first system compares with a second one by one metric."""

    difference: float
    """First minus second, on the whole set; above 0 the first is better."""
    low: float
    """Lower end of the 95 % interval of the difference (percentiles of the draws)."""
    high: float
    p_value: float
    """Two-sided: twice the share of draws in which the better system is not better, at most 1; 1 where the
    difference is 0. At least 2 / (resamples + 1), as a finite number of draws can not show less."""
    resamples: int
    seed: int
    note: str = ""


def paired_bootstrap(
    references: Sequence[Sequence[str]],
    first: Sequence[str],
    second: Sequence[str],
    metrics: Sequence[str] = E2E_METRICS,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Comparison]:
    """Compare two systems' texts for the same inputs. Raises what `evaluate` raises."""
    one, other = (evaluate(references, texts, metrics) for texts in (first, second))
    return compare(one, other, resamples=resamples, seed=seed)


def compare(
    first: Mapping[str, Evaluated], second: Mapping[str, Evaluated], *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Comparison]:
    """Compare two systems that `evaluate` has scored by the same metrics; every metric sees the same draws.

    Raises MetricError for unequal counts of inputs, or for no resamples.
    """
    sizes = {len(e.rows) for e in (*first.values(), *second.values())}
    if len(sizes) != 1 or resamples < 1:
        raise MetricError(f"a bootstrap needs equal counts of inputs ({sizes}) and at least 1 resample ({resamples})")
    draws = _draws(sizes.pop(), resamples, seed)
    return {name: _compare(name, e.rows, second[name].rows, draws, seed) for name, e in first.items()}


def _draws(num_inputs: int, resamples: int, seed: int) -> Rows:
    """(resamples, inputs): how often an input is in a draw."""
    generator = np.random.default_rng(seed)
    drawn = generator.integers(num_inputs, size=(resamples, num_inputs))
    return np.stack([np.bincount(row, minlength=num_inputs) for row in drawn]).astype(np.float64)


def _compare(name: str, first: Rows, second: Rows, draws: Rows, seed: int) -> Comparison:
    from_sums = load(name).from_sums
    difference = from_sums(first.sum(axis=0)) - from_sums(second.sum(axis=0))
    pairs = zip(draws @ first, draws @ second, strict=True)
    differences = np.array([from_sums(one) - from_sums(other) for one, other in pairs])
    low, high = np.percentile(differences, [2.5, 97.5])
    return Comparison(
        difference=difference,
        low=float(low),
        high=float(high),
        p_value=_p_value(difference, differences),
        resamples=len(draws),
        seed=seed,
        note=METEOR_NOTE if name == "meteor" else "",
    )


def _p_value(difference: float, differences: Rows) -> float:
    if difference == 0:
        return 1.0
    not_better = int(np.sum(differences <= 0 if difference > 0 else differences >= 0))
    return min(1.0, 2 * (not_better + 1) / (len(differences) + 1))
