"""Turns, and what they say: a median with its spread, arms that take turns, and what is kept of them.

A full bench takes an hour. Every finished round is kept in the folder of its report, so that an interrupted bench goes
on from there: a ratio is taken within a round, and rounds of different times stand beside each other anyway.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from antefix import atomic
from antefix.errors import BenchmarkError

ROUNDS_FILE = "rounds.json"
Watch = Callable[[int, int, str], None]
"""Called before every turn: turns done, turns in all, what is done now."""


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


class Kept:
    """What was measured of a bench: finished rounds, and choices that later rounds must share.

    In a folder they outlive the process; without one they are forgotten with it.
    """

    def __init__(self, folder: Path | None = None, made_with: Mapping[str, Any] | None = None) -> None:
        """made_with: settings, machine, versions. Raises BenchmarkError where the folder holds a bench of others."""
        self._path = None if folder is None else folder / ROUNDS_FILE
        self._content: dict[str, Any] = {"made_with": json.loads(json.dumps(made_with)), "choices": {}, "rounds": []}
        if self._path is not None and self._path.exists():
            try:
                found = json.loads(self._path.read_text(encoding="utf-8"))
                same = found["made_with"] == self._content["made_with"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise BenchmarkError(f"{self._path}: not a bench's rounds; remove it or give another --out") from error
            if not same:
                raise BenchmarkError(
                    f"{self._path} holds rounds with other settings, versions or of another machine: give another --out"
                )
            self._content = found

    def choice(self, name: str, make: Callable[[], float]) -> float:
        """What was chosen under this name; chosen now, if nothing was."""
        if name not in self._content["choices"]:
            self._content["choices"][name] = make()
            self._save()
        return float(self._content["choices"][name])

    def rounds(self, arms: Sequence[str]) -> list[dict[str, float]]:
        """The finished rounds of exactly these arms."""
        return [r for r in self._content["rounds"] if r.keys() == set(arms)]

    def add(self, rates: dict[str, float]) -> None:
        """A finished round."""
        self._content["rounds"].append(rates)
        self._save()

    def _save(self) -> None:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            atomic.write_bytes(self._path, f"{json.dumps(self._content, indent=1)}\n".encode())


def interleave(
    arms: Mapping[str, Callable[[int], float]],
    rounds: int,
    watch: Callable[[int, str], None] = lambda done, arm: None,
    kept: Kept | None = None,
) -> dict[str, list[float]]:
    """Every arm works once a round, in an order that turns round every time (A B, B A, ...).

    An arm is called with the number of the round and returns its rate. watch: called before every turn with how many
    turns are done. kept: rounds that are done already, and where finished ones go.
    """
    kept = kept or Kept()
    for number in range(len(kept.rounds(list(arms))), rounds):
        order = list(arms) if number % 2 == 0 else list(arms)[::-1]
        rates = {}
        for place, name in enumerate(order):
            watch(number * len(arms) + place, name)
            rates[name] = arms[name](number)
        kept.add(rates)
    done = kept.rounds(list(arms))[:rounds]
    return {name: [rates[name] for rates in done] for name in arms}
