"""Hierarchical blocking and sparse prefixes where sources and targets have several sentences' worth to say.

    python experiments/blocking.py path/to/webnlg

WebNLG's sources of four and more triples and their targets of at least two sentences; 400 training pairs seen once,
SmolLM2-135M, ten slots, the same pairs in every step. Prefix-tuning beside: two blocks in the lower half of the layers
(hierarchical), in all (uniform), a learned temperature, and the latter with hierarchical blocks. One seed, and a second
one of prefix-tuning, which says what a seed changes; dev loss, BLEU of greedy texts for 60 test sources. Writes
`results/blocking/`; half an hour on two cores.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from antefix.data import sample_pairs
from antefix.data.example import Example

from arms import Ours, Schedule, encoded, scored, trained, webnlg_examples  # isort: skip
from smollm import smollm  # isort: skip
from units import ROOT, Unit, announce, finish  # isort: skip

RESULTS = ROOT / "results" / "blocking"
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "prefix_tuning": ("prefix_tuning", {}),
    "hierarchical_blocks": ("hierarchical_blocking", {"blocks": 2}),
    "uniform_blocks": ("hierarchical_blocking", {"blocks": 2, "blocked_layers": 1.0}),
    "soft_sparse": ("sparse_prefix", {}),
    "soft_sparse_hierarchical_blocks": ("sparse_prefix", {"blocks": 2}),
}
SEEDS, PAIRS = {name: (0, 1) if name == "prefix_tuning" else (0,) for name in ARMS}, 400


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1]).resolve()
    names = {f"{name}_seed_{seed}": (name, seed) for name in ARMS for seed in SEEDS[name]}
    units = {unit: Unit(partial(run, folder, *what), 450.0) for unit, what in names.items()}
    announce(RESULTS / "units", units)
    found = finish(RESULTS / "units", units)
    (RESULTS / "summary.json").write_text(json.dumps(summary(found), indent=1) + "\n", encoding="utf-8")


def run(folder: Path, name: str, seed: int) -> dict[str, Any]:
    base = smollm()
    method, config = ARMS[name]
    arm = Ours(base, method, **config)
    train = encoded(base, sample_pairs(long_ones(webnlg_examples(folder / "train.jsonl.gz")), PAIRS, seed=0))
    dev = encoded(base, sample_pairs(long_ones(webnlg_examples(folder / "dev.jsonl.gz")), 150, seed=0))
    test = long_ones(webnlg_examples(folder / "test.jsonl.gz"))
    curve = trained(arm, train, dev, Schedule(learning_rate=5e-2, pairs_seen=PAIRS, seed=seed, evaluate_every=None))
    made = {"arm": name, "seed": seed, "precision": base.precision, "stored_values": arm.stored_values}
    return {**made, "pairs_seen_and_dev_loss": curve, "test": scored(arm, test[:: len(test) // 60][:60])}


def long_ones(examples: list[Example]) -> list[Example]:
    """Of at least four triples, with the targets that have two sentences or more."""
    found = []
    for example in examples:
        targets = tuple(t for t in example.targets if ". " in t)
        if targets and len(example.source.triples) >= 4:
            found.append(replace(example, targets=targets))
    return found


def summary(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Every seed's figures."""
    of_arms = {}
    for name in ARMS:
        units = [u for u in found.values() if u["arm"] == name]
        of_arms[name] = {
            "dev_loss": [round(u["pairs_seen_and_dev_loss"][-1][1], 4) for u in units],
            "bleu": [round(u["test"]["bleu"], 4) for u in units],
        }
    return of_arms


if __name__ == "__main__":
    main()
