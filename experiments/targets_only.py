"""What it costs and brings that targets alone see the prefix: dev loss, and speed once every source is read once.

    python experiments/targets_only.py path/to/e2e-dataset.zip

Prefix-tuning beside infix-tuning (`keep_source_states`), both at their defaults, on SmolLM2-135M in float32: three
epochs of 500 pairs of 500 tables, two seeds, that is orders of the data. Then both alternate in one process, on these
and on 1,000 pairs of about 110 tables, and a ratio of pairs a second is taken of every round. Writes
`results/targets_only/`; an hour and a half on two cores.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import antefix
from antefix.attach import attach
from antefix.base import Base
from antefix.batches.head import pair_losses
from antefix.data import sample_pairs
from antefix.data.encode import Encoded, Limits, encode
from antefix.data.example import Example
from antefix.data.linearise import default_format
from antefix.data.plan import steps
from antefix.methods import method_class
from antefix.methods.base import MethodModule
from antefix.training.feed import feed_of
from antefix.training.loop import StepReport, train_loop
from antefix.training.recipe import TrainingRecipe

from units import ROOT, Unit, announce, finish  # isort: skip

RESULTS = ROOT / "results" / "targets_only"
METHODS, SEEDS = ("prefix_tuning", "infix"), (0, 1)
LEARNED, OTHER = "500_pairs_of_500_tables", "1000_pairs_of_110_tables"
EPOCHS, PAIRS_PER_STEP, ROUNDS, STEPS_A_ROUND = 3, 16, 7, 6


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    data = Path(sys.argv[1]).resolve()
    units = {
        f"{method}_seed_{seed}": Unit(partial(run, data, method, seed), 400.0) for seed in SEEDS for method in METHODS
    }
    units |= {f"speed_{name}": Unit(partial(speed, data, name), 150.0) for name in (LEARNED, OTHER)}
    announce(RESULTS / "units", units)
    found = finish(RESULTS / "units", units)
    (RESULTS / "summary.json").write_text(json.dumps(summary(found), indent=1) + "\n", encoding="utf-8")


def run(data: Path, method: str, seed: int) -> dict[str, Any]:
    """Dev loss after every epoch."""
    base, train, dev = ready(data, LEARNED)
    recipe = TrainingRecipe(
        pairs_per_step=PAIRS_PER_STEP,
        seed=seed,
        evaluations=EPOCHS,
        epochs=EPOCHS,
        keep_source_states=method == "infix",
    )
    reports = trained(base, method, train, dev, recipe)
    curve = [r.dev_scores["dev_loss"] for r in reports if r.dev_scores]
    made = {"method": method, "data": LEARNED, "seed": seed, "precision": base.precision}
    return {**made, "dev_loss_after_each_epoch": curve}


def speed(data: Path, name: str) -> dict[str, Any]:
    """Pairs a second of infix-tuning once every source was read, as a multiple of prefix-tuning's."""
    arms = {method: Paced(method, data, name) for method in METHODS}
    for arm in arms.values():
        arm.epoch()
    ratios = []
    for number in range(ROUNDS):
        order = METHODS if number % 2 == 0 else METHODS[::-1]
        seconds = {method: arms[method].steps(STEPS_A_ROUND) for method in order}
        ratios.append(seconds["prefix_tuning"] / seconds["infix"])
    return {"data": name, "pairs_per_second_ratios": ratios, "median": statistics.median(ratios)}


class Paced:
    """A training run, step by step; it stays attached to a base of its own."""

    def __init__(self, method: str, data: Path, name: str) -> None:
        base, self._train, _ = ready(data, name)
        recipe = TrainingRecipe(pairs_per_step=PAIRS_PER_STEP, keep_source_states=method == "infix")
        module, rate = built(base, method)
        self._feed = feed_of(base.model, module, attach(base.model, module), self._train, "packed", recipe)
        self._optimiser = torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=0.0)
        self._plan = steps(self._train, pairs_per_step=PAIRS_PER_STEP, targets_per_row=recipe.targets_per_row, seed=0)

    def epoch(self) -> None:
        self.steps(-(-self._train.num_pairs // PAIRS_PER_STEP))

    def steps(self, count: int) -> float:
        """Optimiser steps; the seconds they took."""
        started = time.perf_counter()
        for units in itertools.islice(self._plan, count):
            for part in self._feed.parts(units):
                pair_losses(self._feed.model, self._feed.batch(part)).mean().backward()
            self._optimiser.step()
            self._optimiser.zero_grad()
        return time.perf_counter() - started


def ready(data: Path, name: str) -> tuple[Base, Encoded, Encoded]:
    """The base, a training and a dev set."""
    base = antefix.load_base("smollm2-135m", dtype="float32")
    every = antefix.read(f"{data}::trainset.csv")
    train = sample_pairs(every, 1000, seed=0) if name.startswith("1000") else one_target_each(every, 500)
    dev = sample_pairs(antefix.read(f"{data}::devset.csv"), 200, seed=0)
    text_format = default_format([e.source for e in train])
    limits = Limits(context=base.context_length)
    encoded, dev_encoded = (encode(e, text_format, base.tokenizer, limits) for e in (train, dev))
    return base, encoded, dev_encoded


def one_target_each(examples: Sequence[Example], count: int) -> list[Example]:
    """One target of every source, for so many sources drawn."""
    draw = random.Random(0)
    return [
        replace(e, targets=(draw.choice(e.targets),)) for e in draw.sample([e for e in examples if e.targets], count)
    ]


def built(base: Base, method: str) -> tuple[MethodModule, float]:
    """A fresh prefix of ten slots, and its default learning rate."""
    found = method_class(method)
    config = found.Config.model_validate({"num_virtual_tokens": 10})
    return found.build(base, config), found.default_learning_rate(config)


def trained(base: Base, method: str, train: Encoded, dev: Encoded, recipe: TrainingRecipe) -> list[StepReport]:
    module, rate = built(base, method)
    reports: list[StepReport] = []
    train_loop(
        base.model, module, train, dev, recipe, learning_rate=rate, digest="", run_folder=None, watch=reports.append
    )
    return reports


def summary(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread over the seeds after every epoch, and the speed ratios."""
    curves: dict[str, list[list[float]]] = {}
    for unit in found.values():
        if "method" in unit:
            curves.setdefault(unit["method"], []).append(unit["dev_loss_after_each_epoch"])
    return {
        "dev_loss": {
            name: {
                "mean": [round(statistics.mean(c), 4) for c in zip(*seeds, strict=True)],
                "standard_deviation": [round(statistics.stdev(c), 4) for c in zip(*seeds, strict=True)],
            }
            for name, seeds in curves.items()
        },
        "speed_of_infix": {u["data"]: {"median": u["median"], "rounds": u["pairs_per_second_ratios"]}
                           for u in found.values() if "median" in u},
    }  # fmt: skip


if __name__ == "__main__":
    main()
