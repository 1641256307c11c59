"""Is one system better than another? The paired bootstrap over inputs (Koehn 2004).

Inputs are drawn with replacement and both systems are scored on the same draw; the differences over many draws
show how far the measured difference depends on which inputs happened to be in the set.

A score is computed anew on every draw from what each input adds to it. Where that cannot be, as with the n-gram
weights of NIST and CIDEr, the metric says in `RESAMPLED` what is done instead, and `Comparison.note` tells it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from antefix.errors import MetricError
from antefix.metrics import RESAMPLES, load
from antefix.metrics.base import Evaluated, Rows

VERSION = "paired-bootstrap.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How a first system compares with a second one by one metric."""

    difference: float
    """First minus second, on the whole set; above 0 the first has the higher score, which not always is better
    (`Metric.HIGHER_IS_BETTER`)."""
    low: float
    """Lower end of the 95 % interval of the difference (percentiles of the draws)."""
    high: float
    p_value: float
    """Two-sided: twice the share of draws in which the better system is not better, at most 1; 1 where the
    difference is 0. At least 2 / (resamples + 1), as a finite number of draws can not show less."""
    resamples: int
    seed: int
    note: str
    """In what they differ from scoring every draw anew; empty where they do not."""


def compare(
    first: Mapping[str, Evaluated], second: Mapping[str, Evaluated], *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Comparison]:
    """Compare two systems that `evaluate` has scored by the same metrics; every metric sees the same draws.

    Raises MetricError for unequal counts of inputs, or for no resamples.
    """
    num_inputs = {len(e.rows) for e in (*first.values(), *second.values())}
    if len(num_inputs) > 1:
        counts = " and ".join(map(str, sorted(num_inputs)))
        raise MetricError(f"systems on {counts} inputs cannot be compared: both must write a text for every input")
    if resamples < 1:
        raise MetricError(f"a bootstrap needs at least 1 resample, {resamples} were asked for")
    pairs = {name: (e.rows, second[name].rows) for name, e in first.items()}
    drawn: dict[str, list[float]] = {name: [] for name in pairs}
    for times_drawn in _draws(num_inputs.pop(), resamples, seed) if pairs else ():
        for name, rows in pairs.items():
            drawn[name].append(_difference(name, rows, times_drawn))
    return {name: _comparison(name, rows, np.array(drawn[name]), seed) for name, rows in pairs.items()}


def _draws(num_inputs: int, resamples: int, seed: int) -> Iterator[Rows]:
    """(inputs,) for every draw: how often an input is in it."""
    generator = np.random.default_rng(seed)
    for _ in range(resamples):
        drawn = generator.integers(num_inputs, size=num_inputs)
        yield np.bincount(drawn, minlength=num_inputs).astype(np.float64)


def _difference(name: str, rows: tuple[Rows, Rows], times_drawn: Rows) -> float:
    from_sums = load(name).from_sums
    first, second = (from_sums(times_drawn @ system) for system in rows)
    return first - second


def _comparison(name: str, rows: tuple[Rows, Rows], differences: Rows, seed: int) -> Comparison:
    difference = _difference(name, rows, np.ones(len(rows[0])))
    low, high = np.percentile(differences, [2.5, 97.5])
    return Comparison(
        difference=difference,
        low=float(low),
        high=float(high),
        p_value=_p_value(difference, differences),
        resamples=len(differences),
        seed=seed,
        note=load(name).RESAMPLED,
    )


def _p_value(difference: float, differences: Rows) -> float:
    if difference == 0:
        return 1.0
    not_better = int(np.sum(differences <= 0 if difference > 0 else differences >= 0))
    return min(1.0, 2 * (not_better + 1) / (len(differences) + 1))
