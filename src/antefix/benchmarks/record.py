"""What a bench found: one shape for all of them, so that one report shows them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from antefix.benchmarks.machine import description
from antefix.benchmarks.rounds import Spread


@dataclass(frozen=True, slots=True)
class Curve:
    """How a figure grows: for every series its points (x, spread of y)."""

    title: str
    x: str
    y: str
    series: dict[str, list[tuple[float, Spread]]]


@dataclass(slots=True, kw_only=True)
class Record:
    """Rates of arms, ratios within a round, single figures and curves."""

    bench: str
    settings: dict[str, Any]
    unit: str
    """Of the arms' rates."""
    rounds: dict[str, list[float]] = field(default_factory=dict)
    """Every arm's rate, round by round."""
    peak_mib: dict[str, float] = field(default_factory=dict)
    """Above the loaded model."""
    ratios: dict[str, Spread] = field(default_factory=dict)
    figures: dict[str, float | str] = field(default_factory=dict)
    """What else was measured, the unit in the name."""
    curves: list[Curve] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=description)

    def add_ratio(self, of: str, to: str) -> None:
        """How many times as fast one arm is as another, within the rounds."""
        pairs = zip(self.rounds[of], self.rounds[to], strict=True)
        self.ratios[f"{of} / {to}"] = Spread.of([a / b for a, b in pairs])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
