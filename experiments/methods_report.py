"""What the units of `methods_side_by_side` say: a table and a plot."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any


def write_report(found: dict[str, dict[str, Any]], names: dict[str, str], budget: int, folder: Path) -> None:
    """`summary.json`, `report.md` and `methods.png`."""
    costs = found["costs"]["methods"]
    summary = {
        name: _of_method(_units_of(found, key), _rates_tried(found, key)) | costs[name] for key, name in names.items()
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(_markdown(summary, budget), encoding="utf-8")
    _plot(summary, folder / "methods.png")


def _units_of(found: dict[str, dict[str, Any]], key: str) -> list[dict[str, Any]]:
    return [unit for name, unit in found.items() if name.rpartition("_seed_")[0] == f"final_{key}"]


def _rates_tried(found: dict[str, dict[str, Any]], key: str) -> list[float]:
    return [unit["learning_rate"] for name, unit in found.items() if name.rpartition("_")[0] == f"search_{key}"]


def _of_method(units: list[dict[str, Any]], rates_tried: list[float]) -> dict[str, Any]:
    first = units[0]
    return {
        "config": first["config"],
        "learning_rate": first["learning_rate"],
        "best_of_the_rates_at_an_end": first["learning_rate"] in (min(rates_tried), max(rates_tried)),
        "stored_values": first["stored_values"],
        "trained_values": first["trained_values"],
        "dev_loss": [round(u["pairs_seen_and_dev_loss"][-1][1], 4) for u in units],
        "bleu": [round(u["test"]["bleu"], 4) for u in units],
        "precision": first["precision"],
    }


def _markdown(summary: dict[str, Any], budget: int) -> str:
    head = ["method", "stored", "trained", "rate", "dev loss", "BLEU", "pairs/s", "a step", "a token", "peak, MiB"]
    rows = [
        [name, f"{s['stored_values']:,}", f"{s['trained_values']:,}", _rate(s),
         _spread(s["dev_loss"]), _spread(s["bleu"]), f"{statistics.median(s['pairs_per_second']):.2f}",
         _ratio(s["step_seconds_ratio"]), _ratio(s["token_seconds_ratio"]), f"{s['peak_mib']:.0f}"]
        for name, s in sorted(summary.items(), key=lambda item: statistics.mean(item[1]["dev_loss"]))
    ]  # fmt: skip
    table = [f"| {' | '.join(row)} |" for row in (head, ["---", *["---:"] * (len(head) - 1)], *rows)]
    return "\n".join([
        "# Methods side by side", "",
        f"1,000 E2E pairs, a budget of {budget:,} stored values; dev loss in nats a token, BLEU of 100 test inputs "
        "(range over seeds in brackets). A step and a token: how many times the time that prefix-tuning takes, with "
        "quartiles. *: the best of the three rates was the lowest or the highest, so a better one may lie beyond.",
        "", *table, "",
    ])  # fmt: skip


def _rate(of_method: dict[str, Any]) -> str:
    return f"{of_method['learning_rate']:.3g}" + ("*" if of_method["best_of_the_rates_at_an_end"] else "")


def _spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def _ratio(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['low']:.2f} to {spread['high']:.2f})"


def _plot(summary: dict[str, Any], path: Path) -> None:
    """A row a method, the lowest dev loss at the top; every seed is a point."""
    from matplotlib.figure import Figure

    ordered = sorted(summary.items(), key=lambda item: -statistics.mean(item[1]["dev_loss"]))
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    quality, bleu, time, memory = figure.subplots(1, 4, sharey=True)
    for row, (name, s) in enumerate(ordered):
        quality.plot(s["dev_loss"], [row] * len(s["dev_loss"]), "o", color=_colour(name))
        bleu.plot(s["bleu"], [row] * len(s["bleu"]), "o", color=_colour(name))
        time.plot(s["step_seconds_ratio"]["median"], row, "s", color="black", label=None if row else "a training step")
        time.plot(s["token_seconds_ratio"]["median"], row, "x", color="black", label=None if row else "a token")
        memory.plot(s["peak_mib"], row, "o", color=_colour(name))
    quality.set_yticks(range(len(ordered)), [f"{name}, {s['stored_values']:,}" for name, s in ordered], fontsize=8)
    quality.set_ylabel("method, stored values")
    quality.set_xlabel("dev loss, nats a token")
    bleu.set_xlabel("BLEU of 100 test inputs")
    time.set_xlabel("time, times prefix-tuning's")
    time.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    memory.set_xlabel("peak memory of a step, MiB")
    for axes in (quality, bleu, time, memory):
        axes.grid(axis="y", linewidth=0.4)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def _colour(name: str) -> str:
    return "tab:orange" if "paper" in name else "tab:blue"
