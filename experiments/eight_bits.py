"""What frozen weights of eight bits cost: a prefix trained over them, and one trained in float32 that writes over them.

    python experiments/eight_bits.py path/to/e2e-dataset.zip

500 E2E pairs, three seeds, SmolLM2-135M. A prefix is trained over the base in float32; its dev loss and the BLEU of its
greedy texts for 53 test inputs are measured over the base in float32, in bfloat16 (where the processor multiplies it
natively) and with eight-bit weights. Then one is trained over the base with eight-bit weights. Needs
`pip install 'antefix[int8]'`. Writes `results/eight_bits/`; most of an hour on two cores.
"""

from __future__ import annotations

import json
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import antefix
from antefix.base import Dtype, native_precision

from arms import Ours, Schedule, dev_loss, pairs_of, scored, trained  # isort: skip
from units import ROOT, Unit, announce, finish  # isort: skip

RESULTS = ROOT / "results" / "eight_bits"
SEEDS = (0, 1, 2)
PRECISIONS: tuple[Dtype, ...] = tuple(dict.fromkeys(("float32", native_precision("cpu"), "int8")))


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    e2e = Path(sys.argv[1]).resolve()
    units = {f"seed_{seed}": Unit(partial(run, e2e, seed), 600.0) for seed in SEEDS}
    announce(RESULTS / "units", units)
    found = finish(RESULTS / "units", units)
    (RESULTS / "summary.json").write_text(json.dumps(summary(found), indent=1) + "\n", encoding="utf-8")


def run(e2e: Path, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {"seed": seed, "int8_is_computed_in": native_precision("cpu")}
    schedule = Schedule(learning_rate=5e-2, pairs_seen=500, seed=seed, evaluate_every=None)
    bases = {dtype: antefix.load_base("smollm2-135m", dtype=dtype) for dtype in PRECISIONS}
    train, dev = (
        pairs_of(bases["float32"], f"{e2e}::{name}.csv", n) for name, n in (("trainset", 500), ("devset", 200))
    )
    test = antefix.read(f"{e2e}::testset_w_refs.csv")[::12]
    in_float32 = Ours(bases["float32"])
    trained(in_float32, train, dev, schedule)
    for dtype, base in bases.items():
        arm = in_float32.over(base)
        with arm.at_work():
            loss = dev_loss(arm, base, dev)
        found[f"trained over float32, used over {dtype}"] = {"dev_loss": loss, "test": scored(arm, test)}
    arm = Ours(bases["int8"])
    ((_, loss),) = trained(arm, train, dev, schedule)
    found["trained over int8, used over int8"] = {"dev_loss": loss, "test": scored(arm, test)}
    return found


def summary(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds."""
    names = [name for name in next(iter(found.values())) if name.startswith("trained")]
    return {name: _over_seeds([unit[name] for unit in found.values()]) for name in names}


def _over_seeds(units: list[dict[str, Any]]) -> dict[str, Any]:
    values = {"dev_loss": [u["dev_loss"] for u in units], "bleu": [u["test"]["bleu"] for u in units]}
    return {
        name: {"mean": round(statistics.mean(v), 4), "standard_deviation": round(statistics.stdev(v), 4), "all": v}
        for name, v in values.items()
    }


if __name__ == "__main__":
    main()
