"""What the units of `beside_peft` say: tables and plots."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from antefix.metrics.base import Evaluated
from antefix.metrics.bootstrap import compare

Found = dict[str, dict[str, Any]]


def write_report(found: Found, best: dict[str, float], folder: Path) -> None:
    """`summary.json`, `report.md`, `curves.png` and `low_data.png`."""
    summary = {
        "searched": {
            arm: {"learning_rate": rate, "dev_loss_after_300_pairs": searched(found, arm)} for arm, rate in best.items()
        },
        "final": final(found, best),
        "untouched": {arm: curve_of(found, f"untouched_{arm}_") for arm in ("ours", "peft_prefix")},
        "low": low(found),
        "extrapolation": {
            name.removeprefix("webnlg_"): {kind: extrapolated(found, unit, kind) for kind in ("seen", "unseen")}
            for name, unit in found.items()
            if name.startswith("webnlg_")
        },
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(markdown(summary), encoding="utf-8")
    plot_curves(summary, folder / "curves.png")
    plot_low(summary, folder / "low_data.png")


def searched(found: Found, arm: str) -> dict[str, float | None]:
    """The dev loss of every learning rate that was tried, those beyond the three too; None: it was not finite."""
    units = [u for name, u in found.items() if name.startswith("search_") and u["arm"] == arm]
    losses = {u["learning_rate"]: u["pairs_seen_and_dev_loss"][-1][1] for u in units}
    return {f"{rate:g}": None if losses[rate] is None else round(losses[rate], 4) for rate in sorted(losses)}


def units_of(found: Found, beginning: str) -> list[dict[str, Any]]:
    return [unit for name, unit in sorted(found.items()) if name.startswith(beginning)]


def curve_of(found: Found, beginning: str) -> dict[str, Any]:
    """Mean and range of the dev loss over seeds, at every evaluation."""
    curves = [unit["pairs_seen_and_dev_loss"] for unit in units_of(found, beginning)]
    columns = [[loss for _, loss in column] for column in zip(*curves, strict=True)]
    return {
        "pairs_seen": [seen for seen, _ in curves[0]],
        "mean_dev_loss": [round(statistics.mean(c), 4) for c in columns],
        "range": [[round(min(c), 4), round(max(c), 4)] for c in columns],
    }


def final(found: Found, best: dict[str, float]) -> dict[str, Any]:
    """Of every arm the dev-loss curve, BLEU of every seed, and how it compares with ours, seed by seed."""
    ours = units_of(found, "final_ours_seed_")
    table = {}
    for arm in best:
        units = units_of(found, f"final_{arm}_seed_")
        table[arm] = {
            **curve_of(found, f"final_{arm}_seed_"),
            "parameters": units[0]["parameters"],
            "bleu": [round(unit["test"]["bleu"], 4) for unit in units],
            "ours_minus_this": [difference(mine, unit) for mine, unit in zip(ours, units, strict=True)],
        }
    return table


def extrapolated(found: Found, unit: dict[str, Any], kind: str) -> dict[str, Any]:
    """BLEU on inputs of one kind of categories, and how it compares with ours."""
    return {"bleu": unit[kind]["bleu"], "ours_minus_this": difference(found["webnlg_ours"], unit, kind)}


def difference(mine: dict[str, Any], other: dict[str, Any], kind: str = "test") -> dict[str, float]:
    """In BLEU, with the 95 % interval and p of a paired bootstrap over inputs."""
    first, second = ({"bleu": evaluated(unit[kind])} for unit in (mine, other))
    compared = compare(first, second)["bleu"]
    return {name: round(getattr(compared, name), 4) for name in ("difference", "low", "high", "p_value")}


def evaluated(test: dict[str, Any]) -> Evaluated:
    return Evaluated(test["bleu"], np.array(test["counts"], dtype=np.float64))


def low(found: Found) -> dict[str, dict[str, Any]]:
    """Mean and standard deviation of BLEU over samples, by arm and number of pairs."""
    table: dict[str, dict[str, Any]] = {}
    for unit in units_of(found, "low_"):
        table.setdefault(unit["arm"], {}).setdefault(str(unit["size"]), []).append(unit["test"]["bleu"])
    return {
        arm: {
            size: {
                "mean": round(statistics.mean(bleu), 4),
                "standard_deviation": round(statistics.stdev(bleu), 4),
                "ours_minus_this": [
                    difference(found[f"low_ours_{size}_sample_{sample}"], found[f"low_{arm}_{size}_sample_{sample}"])
                    for sample in range(len(bleu))
                ],
            }
            for size, bleu in sorted(sizes.items(), key=lambda item: int(item[0]))
        }
        for arm, sizes in table.items()
    }


def markdown(summary: dict[str, Any]) -> str:
    seen = summary["final"]["ours"]["pairs_seen"]
    finals = [
        [arm, f"{row['parameters']:,}", f"{summary['searched'][arm]['learning_rate']:g}",
         *_losses(row),
         " and ".join(f"{b:.4f}" for b in row["bleu"]),
         " and ".join(map(_difference, row["ours_minus_this"]))]
        for arm, row in summary["final"].items()
    ]  # fmt: skip
    untouched = [
        [arm, *_losses(row)]
        for arm, row in summary["untouched"].items()
    ]  # fmt: skip
    sizes = list(next(iter(summary["low"].values())))
    lows = [
        [arm, *(f"{row[size]['mean']:.4f} ± {row[size]['standard_deviation']:.4f}" for size in sizes)]
        for arm, row in summary["low"].items()
    ]
    unseen = [
        [arm, *(f"{row[kind]['bleu']:.4f}" for kind in ("seen", "unseen")),
         *(_difference(row[kind]["ours_minus_this"]) for kind in ("seen", "unseen"))]
        for arm, row in summary["extrapolation"].items()
    ]  # fmt: skip
    samples = [
        [arm, *(" and ".join(map(_difference, row[size]["ours_minus_this"])) for size in sizes)]
        for arm, row in summary["low"].items()
        if arm != "ours"
    ]
    tried = [
        [arm, ", ".join(f"{rate}: {_loss(loss)}" for rate, loss in row["dev_loss_after_300_pairs"].items())]
        for arm, row in summary["searched"].items()
    ]
    after = [f"dev loss at {n}" for n in seen]
    return "\n".join([
        "# Beside PEFT", "", "1,000 E2E pairs, each arm at its searched best; two seeds, their range in brackets:", "",
        *_table(
            ["arm", "trained values", "learning rate", *after, "test BLEU", "BLEU of ours minus this (95 %)"], finals
        ),
        "", "Dev loss after 300 pairs by learning rate. The best of three was taken; a fourth is one step further,",
        "for arms whose best was the greatest:", "",
        *_table(["arm", "learning rate: dev loss"], tried),
        "", "Untouched defaults, the same pairs:", "",
        *_table(["arm", *(f"dev loss at {n}" for n in summary["untouched"]["ours"]["pairs_seen"])], untouched),
        "", "Few pairs: BLEU of 100 test inputs, mean and standard deviation of three samples:", "",
        *_table(["arm", *(f"{size} pairs" for size in sizes)], lows),
        "", "The same, BLEU of ours minus this (95 %), sample by sample:", "",
        *_table(["arm", *(f"{size} pairs" for size in sizes)], samples),
        "", "WebNLG: BLEU on 100 inputs of categories seen in training, and of unseen ones:", "",
        *_table(["arm", "seen", "unseen", "ours minus this (95 %), seen", "unseen"], unseen), "",
    ])  # fmt: skip


def _loss(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.3f}"


def _difference(found: dict[str, float]) -> str:
    return f"{found['difference']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f})"


def _losses(row: dict[str, Any]) -> list[str]:
    means = zip(row["mean_dev_loss"], row["range"], strict=True)
    return [f"{mean:.3f} ({low:.3f} to {high:.3f})" for mean, (low, high) in means]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---", *["---:"] * (len(head) - 1)], *rows)]


def plot_curves(summary: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for arm, row in summary["final"].items():
        (line,) = axes.plot(row["pairs_seen"], row["mean_dev_loss"], marker="o", label=arm.replace("_", " "))
        low, high = zip(*row["range"], strict=True)
        axes.fill_between(row["pairs_seen"], low, high, alpha=0.15, color=line.get_color())
    axes.set_xlabel("pairs seen")
    axes.set_ylabel("dev loss, nats a token")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def plot_low(summary: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for arm, row in summary["low"].items():
        axes.errorbar(
            [int(size) for size in row], [cell["mean"] for cell in row.values()],
            yerr=[cell["standard_deviation"] for cell in row.values()], marker="o", capsize=3,
            label=arm.replace("_", " "),
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks([50, 100, 200, 500], ["50", "100", "200", "500"])
    axes.minorticks_off()
    axes.set_xlabel("training pairs")
    axes.set_ylabel("BLEU (100 test inputs, greedy)")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
