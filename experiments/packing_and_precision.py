"""What packing and bfloat16 cost in quality: dev loss over 1,000 E2E pairs seen, fast against plain.

    python experiments/packing_and_precision.py path/to/e2e-dataset.zip

Pairs are drawn from the whole training set, as the bench draws them. Plain is one target a row, float32. Three seeds:
the order of the data is all that they change. Writes `results/packing_and_precision/`; two hours on two cores.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import antefix
from antefix.base import Dtype
from antefix.data import sample_pairs
from antefix.data.encode import Encoded, Limits, encode
from antefix.data.linearise import default_format
from antefix.methods import method_class
from antefix.training.loop import StepReport, train_loop
from antefix.training.recipe import TrainingRecipe

from units import ROOT, Unit, announce, finish  # isort: skip

RESULTS = ROOT / "results" / "packing_and_precision"
PAIRS_SEEN, SEEDS = 1000, (0, 1, 2)
ALL = 100
"""More targets than any source has."""


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    data = Path(sys.argv[1]).resolve()
    units = {}
    for dtype, pairs_per_step, targets_per_row in grid():
        for seed in SEEDS:
            name = f"{dtype}_{pairs_per_step}_pairs_a_step_{_row(targets_per_row)}_a_row_seed_{seed}"
            work = partial(run, data, dtype, pairs_per_step, targets_per_row, seed)
            units[name] = Unit(work, 190.0 if dtype == "float32" else 75.0)
    announce(RESULTS / "units", units)
    found = finish(RESULTS / "units", units)
    (RESULTS / "summary.json").write_text(json.dumps(summary(found), indent=1) + "\n", encoding="utf-8")
    plot(found, RESULTS / "curves.png")


def grid() -> Iterator[tuple[Dtype, int, int]]:
    """Precision, pairs a step, targets a row."""
    yield "float32", 10, 1
    for targets_per_row in (1, 2, 3, 4, ALL):
        for pairs_per_step in (10, 32):
            yield "bfloat16", pairs_per_step, targets_per_row


def run(data: Path, dtype: Dtype, pairs_per_step: int, targets_per_row: int, seed: int) -> dict[str, Any]:
    """Dev loss at every quarter."""
    base = antefix.load_base("smollm2-135m", dtype=dtype)
    train, dev = (encoded(base, f"{data}::{name}.csv", pairs) for name, pairs in (("trainset", None), ("devset", 200)))
    recipe = TrainingRecipe(
        pairs_per_step=pairs_per_step, targets_per_row=targets_per_row, seed=seed, evaluations=4,
        max_steps=-(-PAIRS_SEEN // pairs_per_step),
    )  # fmt: skip
    method = method_class("prefix_tuning")
    config = method.Config.model_validate({"num_virtual_tokens": 10})
    reports: list[StepReport] = []
    train_loop(
        base.model, method.build(base, config), train, dev, recipe,
        learning_rate=method.default_learning_rate(config), digest="", run_folder=None, watch=reports.append,
    )  # fmt: skip
    curve = [(r.step * pairs_per_step, r.dev_scores["dev_loss"]) for r in reports if r.dev_scores]
    return {
        "dtype": dtype, "pairs_per_step": pairs_per_step, "targets_per_row": _row(targets_per_row), "seed": seed,
        "pairs_seen_and_dev_loss": curve,
    }  # fmt: skip


def encoded(base: antefix.Base, data: str, pairs: int | None) -> Encoded:
    examples = antefix.read(data)
    if pairs is not None:
        examples = sample_pairs(examples, pairs, seed=0)
    text_format = default_format([e.source for e in examples])
    return encode(examples, text_format, base.tokenizer, Limits(context=base.context_length))


def summary(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every setting the mean over the seeds, at every quarter, and their spread."""
    settings: dict[tuple[str, int, str], list[list[float]]] = {}
    for unit in found.values():
        key = (unit["dtype"], unit["pairs_per_step"], str(unit["targets_per_row"]))
        settings.setdefault(key, []).append([loss for _, loss in unit["pairs_seen_and_dev_loss"]])
    return [
        {
            "dtype": dtype, "pairs_per_step": pairs, "targets_per_row": row,
            "mean_dev_loss": [round(statistics.mean(column), 4) for column in zip(*curves, strict=True)],
            "standard_deviation": [round(statistics.stdev(column), 4) for column in zip(*curves, strict=True)],
        }
        for (dtype, pairs, row), curves in settings.items()
    ]  # fmt: skip


def plot(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Mean and range over the seeds against pairs seen: packing at 10 and at 32 pairs a step, precision."""
    from matplotlib.figure import Figure

    panels = {
        "10 pairs a step, bfloat16": ("targets_per_row", {"dtype": "bfloat16", "pairs_per_step": 10}),
        "32 pairs a step, bfloat16": ("targets_per_row", {"dtype": "bfloat16", "pairs_per_step": 32}),
        "10 pairs a step, 1 target a row": ("dtype", {"pairs_per_step": 10, "targets_per_row": 1}),
    }
    figure = Figure(figsize=(13, 4), layout="constrained")
    for axes, (title, (by, chosen)) in zip(figure.subplots(1, 3, sharey=True), panels.items(), strict=True):
        curves: dict[str, list[Any]] = {}
        for unit in found.values():
            if chosen.items() <= unit.items():
                curves.setdefault(str(unit[by]), []).append(unit["pairs_seen_and_dev_loss"])
        for label, seeds in curves.items():
            seen = [n for n, _ in seeds[0]]
            columns = list(zip(*([loss for _, loss in curve] for curve in seeds), strict=True))
            (line,) = axes.plot(seen, [statistics.mean(c) for c in columns], marker="o", label=label)
            axes.fill_between(
                seen, [min(c) for c in columns], [max(c) for c in columns], alpha=0.15, color=line.get_color()
            )
        axes.set_title(title)
        axes.set_xlabel("pairs seen")
        axes.legend(title=by.replace("_", " "))
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("dev loss, nats a token")
    figure.supxlabel("mean and range of three seeds", fontsize="small")
    figure.savefig(path, dpi=130)


def _row(targets_per_row: int) -> int | str:
    return "all" if targets_per_row == ALL else targets_per_row


if __name__ == "__main__":
    main()
