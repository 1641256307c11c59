"""Turns, and what they say: a median with its spread, arms that take turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


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
