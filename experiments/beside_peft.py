"""Quality beside PEFT: prefixes, LoRA and full fine-tuning on the same pairs, each at its searched best.

    python experiments/beside_peft.py path/to/e2e-dataset.zip path/to/webnlg

The folder holds WebNLG 2017 as train.jsonl.gz, dev.jsonl.gz and test.jsonl.gz (with `triples`, `lexs`, and `seen` in
the test set).
Everything is float32 on SmolLM2-135M. Units, in this order:

- search: three learning rates an arm, 300 pairs each; the best by dev loss goes on.
- final: 1,000 pairs (the same in every step of every arm), two seeds, dev loss at every 250 pairs, greedy texts for
  every second test input.
- untouched: each library's defaults, nothing set but the number of slots.
- low: 50 to 500 pairs, three samples, ours against LoRA and full fine-tuning (Li & Liang 2021, figure 3).
- extrapolation: trained on WebNLG's seen categories, tested on seen and unseen ones (section 6.4 there).

Every finished unit is a file in `results/beside_peft/units/`: figures and counts, no texts. The report is written from
what is there.
"""

from __future__ import annotations

import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import antefix
from antefix.data import sample_pairs
from antefix.methods import method_class
from antefix.training.recipe import TrainingRecipe

from arms import ARMS, Schedule, encoded, pairs_of, scored, trained, webnlg_examples  # isort: skip
from beside_peft_report import write_report  # isort: skip
from units import ROOT, Unit, announce, finish  # isort: skip

RESULTS = ROOT / "results" / "beside_peft"
RATES: dict[str, tuple[float, float, float]] = {
    "ours": (2e-2, 5e-2, 1e-1),
    "ours_network": (5e-5, 2e-4, 1e-3),
    "peft_prefix": (2e-2, 5e-2, 1e-1),
    "peft_prefix_text": (1e-2, 2e-2, 5e-2),
    "peft_prefix_projection": (1e-4, 1e-3, 5e-3),
    "peft_lora": (1e-3, 3e-3, 1e-2),
    "full": (1e-5, 5e-5, 2e-4),
}
BEYOND: dict[str, float] = {"peft_prefix": 3e-1, "peft_prefix_text": 1e-1, "peft_lora": 3e-2, "full": 5e-4}
"""One step further for arms whose best is the greatest of the three: a run more than the others get, told beside."""
SECONDS_A_PAIR = {"ours": 0.13, "ours_network": 0.15, "peft_lora": 0.17, "full": 0.3}
"""About, on two cores; what is not here takes 0.3."""
LOW = ("ours", "peft_lora", "full")
SIZES, SAMPLES, SEEDS = (50, 100, 200, 500), (0, 1, 2), (0, 1)


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    e2e, webnlg = (Path(argument).resolve() for argument in sys.argv[1:])
    for path in (e2e, *(webnlg / f"{name}.jsonl.gz" for name in ("train", "dev", "test"))):
        if not path.is_file():
            sys.exit(f"{path}: no such file")
    folder = RESULTS / "units"
    search = {
        f"search_{arm}_{rate:g}": Unit(partial(run, e2e, arm, rate, 300, seed=0), _seconds(arm, 300, 1))
        for arm, rates in RATES.items()
        for rate in rates
    }
    beyond = {
        f"search_{arm}_{rate:g}": Unit(partial(run, e2e, arm, rate, 300, seed=0), _seconds(arm, 300, 1))
        for arm, rate in BEYOND.items()
    }
    later = later_units(e2e, webnlg, dict.fromkeys(RATES, 0.0))
    announce(folder, {**search, **beyond, **later})
    found = finish(folder, search)
    best = {
        arm: min(rates, key=lambda rate, arm=arm: _last_loss(found[f"search_{arm}_{rate:g}"]))  # type: ignore[misc]
        for arm, rates in RATES.items()
    }
    found |= finish(folder, later_units(e2e, webnlg, best))
    found |= finish(folder, beyond)
    write_report(found, best, RESULTS)


def later_units(e2e: Path, webnlg: Path, best: dict[str, float]) -> dict[str, Unit]:
    """All that needs the searched learning rates."""
    final = {
        f"final_{arm}_seed_{seed}": Unit(
            partial(run, e2e, arm, best[arm], 1000, seed, test=2), _seconds(arm, 1000, 4, 315)
        )
        for seed in SEEDS
        for arm in ARMS
    }
    untouched = {
        f"untouched_{arm}_seed_{seed}": Unit(partial(run_untouched, e2e, arm, seed), _seconds(arm, 1000, 4))
        for arm in ("ours", "peft_prefix")
        for seed in SEEDS
    }
    low = {
        f"low_{arm}_{size}_sample_{sample}": Unit(
            partial(run_low, e2e, arm, best[arm], size, sample), _seconds(arm, min(1000, 10 * size), 1, 100)
        )
        for sample in SAMPLES
        for size in SIZES
        for arm in LOW
    }
    extrapolation = {
        f"webnlg_{arm}": Unit(partial(run_webnlg, webnlg, arm, best[arm]), 2 * _seconds(arm, 1000, 4, 200))
        for arm in LOW
    }
    return {**final, **untouched, **low, **extrapolation}


def run(e2e: Path, arm_name: str, rate: float, pairs: int, seed: int, *, test: int | None = None) -> dict[str, Any]:
    """Train on the first `pairs` of the same 1,000; test: texts for every so many-th test input."""
    base = antefix.load_base("smollm2-135m")
    arm = ARMS[arm_name](base)
    train, dev = (pairs_of(base, f"{e2e}::{name}.csv", n) for name, n in (("trainset", 1000), ("devset", 200)))
    schedule = Schedule(learning_rate=rate, pairs_seen=pairs, seed=seed, evaluate_every=250 if pairs >= 1000 else None)
    found: dict[str, Any] = {"arm": arm_name, "learning_rate": rate, "seed": seed, "parameters": _count(arm)}
    found["pairs_seen_and_dev_loss"] = _finite(trained(arm, train, dev, schedule))
    if test is not None:
        found["test"] = scored(arm, antefix.read(f"{e2e}::testset_w_refs.csv")[::test])
    return found


def run_untouched(e2e: Path, arm_name: str, seed: int) -> dict[str, Any]:
    """Ours: TrainingRecipe and the method's rate. PEFT: its config and transformers' TrainingArguments."""
    base = antefix.load_base("smollm2-135m")
    arm = ARMS[arm_name](base)
    train, dev = (pairs_of(base, f"{e2e}::{name}.csv", n) for name, n in (("trainset", 1000), ("devset", 200)))
    if arm_name == "ours":
        recipe = TrainingRecipe()
        method = method_class("prefix_tuning")
        schedule = Schedule(
            learning_rate=method.default_learning_rate(method.Config()), pairs_seen=1000, seed=seed,
            pairs_per_step=recipe.pairs_per_step,
            targets_per_row=recipe.targets_per_row,
        )  # fmt: skip
    else:
        schedule = Schedule(
            learning_rate=5e-5, pairs_seen=1000, seed=seed, pairs_per_step=8, targets_per_row=1, warmup=0.0
        )
    return {
        "arm": arm_name, "seed": seed, "learning_rate": schedule.learning_rate,
        "pairs_per_step": schedule.pairs_per_step,
        "pairs_seen_and_dev_loss": _finite(trained(arm, train, dev, schedule)),
    }  # fmt: skip


def run_low(e2e: Path, arm_name: str, rate: float, size: int, sample: int) -> dict[str, Any]:
    """A sample of so many pairs, seen ten times, but no more than 1,000 pairs in all."""
    base = antefix.load_base("smollm2-135m")
    arm = ARMS[arm_name](base)
    train = pairs_of(base, f"{e2e}::trainset.csv", size, seed=100 + sample)
    dev = pairs_of(base, f"{e2e}::devset.csv", 200)
    schedule = Schedule(learning_rate=rate, pairs_seen=min(1000, 10 * size), seed=sample, evaluate_every=None)
    curve = _finite(trained(arm, train, dev, schedule))
    test = antefix.read(f"{e2e}::testset_w_refs.csv")[::6][:100]
    return {
        "arm": arm_name, "size": size, "sample": sample, "learning_rate": rate, "pairs_seen_and_dev_loss": curve,
        "test": scored(arm, test),
    }  # fmt: skip


def run_webnlg(folder: Path, arm_name: str, rate: float) -> dict[str, Any]:
    """Trained on seen categories; scored on both kinds."""
    base = antefix.load_base("smollm2-135m")
    arm = ARMS[arm_name](base)
    train = encoded(base, sample_pairs(webnlg_examples(folder / "train.jsonl.gz"), 1000, seed=0))
    dev = encoded(base, sample_pairs(webnlg_examples(folder / "dev.jsonl.gz"), 100, seed=0))
    curve = _finite(trained(arm, train, dev, Schedule(learning_rate=rate, pairs_seen=1000, seed=0)))
    test = {seen: webnlg_examples(folder / "test.jsonl.gz", seen=seen) for seen in (True, False)}
    return {
        "arm": arm_name, "learning_rate": rate, "pairs_seen_and_dev_loss": curve,
        **{"seen" if seen else "unseen": scored(arm, rows[:: len(rows) // 100][:100]) for seen, rows in test.items()},
    }  # fmt: skip


def _seconds(arm: str, pairs: int, evaluations: int, texts_written: int = 0) -> float:
    a_pair = SECONDS_A_PAIR.get(arm, 0.3)
    return 5 + a_pair * (pairs + 80 * evaluations) + 0.25 * texts_written


def _count(arm: Any) -> int:
    return sum(p.numel() for p in arm.parameters)


def _finite(curve: list[tuple[int, float]]) -> list[tuple[int, float | None]]:
    return [(seen, loss if math.isfinite(loss) else None) for seen, loss in curve]


def _last_loss(unit: dict[str, Any]) -> float:
    loss = unit["pairs_seen_and_dev_loss"][-1][1]
    return math.inf if loss is None else float(loss)


if __name__ == "__main__":
    main()
