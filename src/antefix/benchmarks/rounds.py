"""Turns, and what they say: rates by round, medians with their spread, ratios within a round."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Spread:
    """A median and the quartiles around it; with fewer than four values the least and the greatest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) < 4:
            return cls(statistics.median(values), min(values), max(values))
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(middle, low, high)

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def interleave(
    arms: Mapping[str, Callable[[int], float]], rounds: int, watch: Callable[[int, str], None] = lambda done, arm: None
) -> dict[str, list[float]]:
    """Every arm works once a round, in an order that turns round every time (A B, B A, ...).

    An arm is called with the number of the round and returns its rate. watch: called before every turn with how many
    turns are done.
    """
    rates: dict[str, list[float]] = {name: [] for name in arms}
    done = 0
    for number in range(rounds):
        order = list(arms) if number % 2 == 0 else list(arms)[::-1]
        for name in order:
            watch(done, name)
            rates[name].append(arms[name](number))
            done += 1
    return rates


def ratio(rates: Mapping[str, Sequence[float]], of: str, to: str) -> Spread:
    """How many times as fast one arm is as another: the spread of the ratios within the rounds."""
    return Spread.of([a / b for a, b in zip(rates[of], rates[to], strict=True)])


def summary(rates: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """For the record: every rate, its spread."""
    return {name: {"rounds": list(values), **Spread.of(values).to_dict()} for name, values in rates.items()}
