"""A bench's record for people: a page of tables, a picture of the ratios, one of the curves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from antefix import atomic
from antefix.benchmarks.record import Curve, Record
from antefix.benchmarks.rounds import Spread


def write_report(record: Record, folder: Path) -> None:
    """`record.json`, `report.md`, and `ratios.png` and `curves.png` where there are any."""
    folder.mkdir(parents=True, exist_ok=True)
    written = json.dumps(record.to_dict(), indent=1, ensure_ascii=False)
    atomic.write_bytes(folder / "record.json", f"{written}\n".encode())
    atomic.write_bytes(folder / "report.md", markdown(record).encode())
    if record.ratios:
        _plot_ratios(record, folder / "ratios.png")
    if record.curves:
        _plot_curves(record, folder / "curves.png")


def markdown(record: Record) -> str:
    """Machine, arms, ratios, and what else was measured."""
    machine = record.machine
    worker = machine.get("accelerator", machine["processor"])
    lines = [
        f"# antefix bench {record.bench}",
        "",
        f"{worker}, {machine['threads']} threads ({', '.join(machine['features'])}); "
        + ", ".join(f"{name} {found}" for name, found in machine["versions"].items())
        + (f"; commit {machine['commit']}" if machine["commit"] else ""),
        "",
        "Settings: " + ", ".join(f"{name} {_plain(value)}" for name, value in record.settings.items()),
    ]
    if record.rounds:
        rates = {name: Spread.of(values) for name, values in record.rounds.items()}
        rows = [
            (name, f"{rate.median:.4g}", f"{rate.low:.4g} to {rate.high:.4g}", _mib(record.peak_mib.get(name)))
            for name, rate in rates.items()
        ]
        lines += ["", *_table(("arm", record.unit, "quartiles", "peak memory, MiB"), rows)]
    if record.ratios:
        ratios = [(name, f"{s.median:.3f}", f"{s.low:.3f} to {s.high:.3f}") for name, s in record.ratios.items()]
        lines += ["", *_table(("ratio within a round", "median", "quartiles"), ratios)]
    if record.figures:
        figures = [(name, _plain(value)) for name, value in record.figures.items()]
        lines += ["", *_table(("figure", ""), figures)]
    for curve in record.curves:
        lines += ["", f"{curve.title}: {curve.y}", "", *_curve_table(curve)]
    return "\n".join(lines) + "\n"


def _curve_table(curve: Curve) -> list[str]:
    xs = sorted({x for points in curve.series.values() for x, _ in points})
    rows = []
    for name, points in curve.series.items():
        known = dict(points)
        rows.append((name, *(f"{known[x].median:.3g}" if x in known else "" for x in xs)))
    return _table((curve.x, *(f"{x:g}" for x in xs)), rows)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    written = [head, ("---", *["---:"] * (len(head) - 1)), *rows]
    return [f"| {' | '.join(row)} |" for row in written]


def _mib(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return " and ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _plot_ratios(record: Record, path: Path) -> None:
    from matplotlib.figure import Figure

    names, spreads = list(record.ratios)[::-1], list(record.ratios.values())[::-1]
    figure = Figure(figsize=(8, 1 + 0.4 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    medians = [s.median for s in spreads]
    error = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
    axes.barh(names, medians, xerr=error, color="#4c72b0", ecolor="#222222", capsize=3)
    axes.axvline(1.0, color="#888888", linewidth=1)
    for row, median in enumerate(medians):
        axes.text(0.02, row, f"{median:.2f}", va="center", color="white", fontweight="bold")
    axes.set_xlabel(f"times as many {record.unit}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def _plot_curves(record: Record, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(record.curves), 4), layout="constrained")
    for axes, curve in zip(figure.subplots(1, len(record.curves), squeeze=False)[0], record.curves, strict=True):
        for name, points in curve.series.items():
            x, spreads = [x for x, _ in points], [s for _, s in points]
            (line,) = axes.plot(x, [s.median for s in spreads], marker="o", label=name)
            axes.fill_between(
                x, [s.low for s in spreads], [s.high for s in spreads], alpha=0.15, color=line.get_color()
            )
        axes.set_xscale("symlog", base=2, linthresh=1)
        axes.set_ylim(bottom=0)
        axes.set_title(curve.title)
        axes.set_xlabel(curve.x)
        axes.set_ylabel(curve.y)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
