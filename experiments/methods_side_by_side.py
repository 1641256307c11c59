"""Methods that act in attention or at the input on the same E2E pairs, each at one budget of stored values.

    python experiments/methods_side_by_side.py path/to/e2e-dataset.zip

SmolLM2-135M in float32. Every method's size is solved for the budget, what a kept prefix of ten slots holds (115,200
values): the largest that does not exceed it; where its smallest is larger, that is said and taken. Three methods are
run at their paper's own size too. A cartridge is left out: it is prefix-tuning that starts from a document. Rates are
chosen on the dev set whose loss is reported. Units, in this order:

- search: three learning rates a method, a third, once and three times its default, 200 pairs each.
- final: 1,000 pairs (the same in every step of every method) at the best rate; dev loss on the way, BLEU of greedy
  texts for 100 test inputs. One seed; three for three methods that promised to be cheap before costs were known.
- costs: time and memory of all methods in turn (`method_costs`), on a machine that does nothing else.

Every finished unit is a file in `results/methods_side_by_side/units/`: figures, no texts. About three hours on two
cores; costs are taken on the processor, the rest on an accelerator where there is one.
"""

from __future__ import annotations

import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import antefix
from antefix.methods import method_class

from arms import Ours, Schedule, pairs_of, scored, trained  # isort: skip
from method_costs import costs  # isort: skip
from methods_report import write_report  # isort: skip
from smollm import smollm  # isort: skip
from units import ROOT, Unit, announce, best_rate, finish  # isort: skip

RESULTS = ROOT / "results" / "methods_side_by_side"
BUDGET = 115_200
SLOTS = [{"num_virtual_tokens": n} for n in range(10, 0, -1)]
SIZES: dict[str, list[dict[str, Any]]] = {
    "prefix_tuning": SLOTS,
    "infix": SLOTS,
    "soft_infix": SLOTS,
    "p_tuning_v2": SLOTS,
    "apt": SLOTS,
    "hierarchical_blocking": SLOTS,
    "sparse_prefix": SLOTS,
    "prompt_tuning": SLOTS,
    "prefix_propagation": SLOTS,
    "llama_adapter": SLOTS,
    "ntk_attention": [{"rank": n} for n in range(8, 0, -1)],
    "inducer": [{"value_extension": False, "key_width": 1, "value_width": n} for n in range(4, 0, -1)],
    "prefix_memory": [{}],
}
"""Configs of every method, the largest first."""
PAPERS_SIZES: dict[str, dict[str, Any]] = {
    "prompt_tuning": {"num_virtual_tokens": 100},
    "ntk_attention": {},
    "inducer": {"key_width": 2, "value_width": 4},
}
"""Of three methods the size of their paper or released code."""
FACTORS = (1 / 3, 1.0, 3.0)
WITH_ALL_SEEDS, SEEDS = ("prefix_tuning", "infix", "llama_adapter"), (0, 1, 2)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    e2e = Path(sys.argv[1]).resolve()
    base = smollm()
    configs = {name: solved(base, name, sizes) for name, sizes in SIZES.items()}
    configs |= {f"{name} at its paper's size": (name, config) for name, config in PAPERS_SIZES.items()}
    for name, (method, config) in configs.items():
        values = Ours(base, method, **config).stored_values
        over = " (its smallest is over the budget)" if values > BUDGET and "paper" not in name else ""
        print(f"{name}: {config or 'as it is'}, {values:,} values{over}", flush=True)
    searches = {
        f"search_{key(name)}_{rate:.3g}": Unit(partial(run, e2e, method, config, rate, 200, 0), 60.0)
        for name, (method, config) in configs.items()
        for rate in rates(method, config)
    }
    finals = {f"final_{key(n)}_seed_{seed}": Unit(dict, 330.0) for n in configs for seed in seeds_of(n)}
    timed = {"costs": Unit(partial(costs, e2e, configs), 900.0)}
    announce(RESULTS / "units", searches | finals | timed)
    searched = finish(RESULTS / "units", searches)
    best = {name: best_rate(searched, f"search_{key(name)}", last_dev_loss) for name in configs}
    finals = {
        f"final_{key(name)}_seed_{seed}": Unit(
            partial(run, e2e, method, config, best[name], 1000, seed, final=True), 330.0
        )
        for name, (method, config) in configs.items()
        for seed in seeds_of(name)
    }
    found = finish(RESULTS / "units", finals | timed)
    write_report(searched | found, {key(name): name for name in configs}, BUDGET, RESULTS)


def solved(base: antefix.Base, method: str, sizes: list[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """The largest config within the budget, or the smallest there is."""
    fitting = (config for config in sizes if Ours(base, method, **config).stored_values <= BUDGET)
    return method, next(fitting, sizes[-1])


def rates(method: str, config: dict[str, Any]) -> list[float]:
    """A third of the default, the default, and three times."""
    found = method_class(method)
    return [found.default_learning_rate(found.Config.model_validate(config)) * factor for factor in FACTORS]


def seeds_of(name: str) -> tuple[int, ...]:
    return SEEDS if name in WITH_ALL_SEEDS else SEEDS[:1]


def key(name: str) -> str:
    return name.replace("'", "").replace(" ", "_")


def last_dev_loss(unit: dict[str, Any]) -> float | None:
    """At the end of a run; None: it is no number."""
    loss: float | None = unit["pairs_seen_and_dev_loss"][-1][1]
    return loss


def run(
    e2e: Path, method: str, config: dict[str, Any], rate: float, pairs: int, seed: int, *, final: bool = False
) -> dict[str, Any]:
    """Train on the first `pairs` of the same 1,000. final: also write texts for test inputs."""
    base = smollm()
    arm = Ours(base, method, **config)
    train, dev = (
        pairs_of(base, f"{e2e}::{name}.csv", n, inserted=arm.num_inserted_tokens)
        for name, n in (("trainset", 1000), ("devset", 200))
    )
    schedule = Schedule(learning_rate=rate, pairs_seen=pairs, seed=seed, evaluate_every=250 if final else None)
    curve = [(seen, loss if math.isfinite(loss) else None) for seen, loss in trained(arm, train, dev, schedule)]
    made = {"method": method, "config": config, "learning_rate": rate, "seed": seed, "precision": base.precision}
    found: dict[str, Any] = {**made, "stored_values": arm.stored_values, "pairs_seen_and_dev_loss": curve}
    found["trained_values"] = sum(p.numel() for p in arm.parameters)
    if final:
        found["test"] = scored(arm, antefix.read(f"{e2e}::testset_w_refs.csv")[::6][:100])
    return found


if __name__ == "__main__":
    main()
