"""Which slots adaptive prefix tuning opens at which layer: a heat map of a task of words and of one of sentences.

    python experiments/apt_gates.py path/to/sst2_16shot path/to/wnut17

MiniLM, 16 slots, gates at one where training starts; the mean over 100 test texts of what multiplies a slot. Names in
noisy texts (every word's tag, 1,000 sentences) have gates from each token's own state, sentiment (one label) gates from
the text's first token, and from each token for comparison. Three seeds of each. Writes `results/apt_gates/`; half
an hour on two cores.
"""

from __future__ import annotations

import gzip
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import antefix
from antefix.attach import attached
from antefix.attention.branch import Call
from antefix.data.example import Example
from antefix.methods.apt import Apt, AptBranch, GateFrom
from antefix.metrics import score
from antefix.parts.key_value import KeyValue
from antefix.sites import Site, find_sites
from antefix.tasks import TASKS, TaskName
from antefix.training.recipe import TrainingRecipe

from few_labels import DEV, DRAWS, sentiment  # isort: skip
from units import ROOT, Unit, announce, finish  # isort: skip

RESULTS = ROOT / "results" / "apt_gates"
ARMS: dict[str, tuple[TaskName, GateFrom]] = {
    "names, gates from every token": ("tagging", "token"),
    "sentiment, gates from the first token": ("classification", "first"),
    "sentiment, gates from every token": ("classification", "token"),
}
SEEDS, SLOTS, TEXTS, TRAIN = (0, 1, 2), 16, 100, 1000


class Watched(Apt):
    """A kept prefix whose gates can be looked at."""

    def branch(self, site: Site, slots: KeyValue, own: Mapping[str, Tensor]) -> AptBranch:
        self.seen: dict[int, list[Tensor]] = getattr(self, "seen", {})
        made = WatchedBranch(slots, own, self.config.gate_from)
        made.into = self.seen.setdefault(site.layer, [])
        return made


class WatchedBranch(AptBranch):
    into: list[Tensor]

    def gate(self, call: Call) -> Tensor:
        gate = super().gate(call)
        self.into.append(gate.mean((0, 1, 2)))
        return gate


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    folders = tuple(Path(a).resolve() for a in sys.argv[1:])
    units = {
        f"{name.replace(', ', '_').replace(' ', '_')}_seed_{seed}": Unit(partial(one, folders, name, seed), 90.0)
        for name in ARMS
        for seed in SEEDS
    }
    announce(RESULTS / "units", units)
    found = finish(RESULTS / "units", units)
    (RESULTS / "summary.json").write_text(json.dumps(summary(found), indent=1) + "\n", encoding="utf-8")
    plot(found)


def one(folders: Sequence[Path], name: str, seed: int) -> dict[str, Any]:
    """Train, look at the gates, score."""
    task, gate_from = ARMS[name]
    base = antefix.load_base("minilm-l6")
    train, dev, test = few_sentences(folders[0]) if task == "classification" else names(folders[1])
    prefix = antefix.train(
        base, train, dev=dev, method="apt", task=task, num_virtual_tokens=SLOTS, gate_from=gate_from,
        training=TrainingRecipe(epochs=20.0 if task == "classification" else 3.0, seed=seed, tokens_per_batch=2048),
    )  # fmt: skip
    of_sites = {name: tensor for name, tensor in prefix.tensors.items() if not name.startswith("head.")}
    watched = Watched.restore(find_sites(base.model), prefix.module(base.model).config, of_sites)
    with attached(base.model, prefix):
        metric = TASKS[task].metrics[0]
        found = score([e.targets for e in test], antefix.label(base, test), [metric])[metric]
    with attached(base.model, watched), torch.inference_mode():
        for example in test[:TEXTS]:
            words = example.source if isinstance(example.source, str) else " ".join(example.source.words)
            base.model(**base.tokenizer(words, return_tensors="pt"))
    gates = [torch.stack(watched.seen[layer]).mean(0).tolist() for layer in sorted(watched.seen)]
    return {"arm": name, "seed": seed, metric: found, "gate_of_layer_and_slot": gates}


def few_sentences(folder: Path) -> tuple[list[Example], list[Example], list[Example]]:
    """All five draws of 32 sentences as one training set."""
    draws = [sentiment(folder, draw) for draw in DRAWS]
    return [e for train, _, _ in draws for e in train], draws[0][1], draws[0][2]


def names(folder: Path) -> tuple[list[Example], list[Example], list[Example]]:
    """Some training and dev sentences, all test sentences."""
    work = ROOT / "experiments" / "work"
    work.mkdir(parents=True, exist_ok=True)
    as_conll = work / "wnut17_test.conll"  # the file's own name ends in .annotated
    as_conll.write_bytes(gzip.decompress((folder / "emerging.test.annotated.gz").read_bytes()))
    train, dev, test = (
        antefix.read(str(path))
        for path in (folder / "wnut17train.conll.gz", folder / "emerging.dev.conll.gz", as_conll)
    )
    return list(train)[:TRAIN], list(dev)[::5][:DEV], list(test)


def summary(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of every arm: the test score and each layer's mean gate, over the seeds."""
    of_arms: dict[str, Any] = {}
    for name, (task, _) in ARMS.items():
        units = [u for u in found.values() if u["arm"] == name]
        layers = [_all_gates(units, layer) for layer in range(len(units[0]["gate_of_layer_and_slot"]))]
        of_arms[name] = {
            TASKS[task].metrics[0]: [round(u[TASKS[task].metrics[0]], 4) for u in units],
            "mean_gate_of_layer": [round(statistics.mean(gates), 3) for gates in layers],
            "least_and_greatest_gate_of_layer": [[round(min(gates), 3), round(max(gates), 3)] for gates in layers],
        }
    return of_arms


def _all_gates(units: list[dict[str, Any]], layer: int) -> list[float]:
    return [gate for u in units for gate in u["gate_of_layer_and_slot"][layer]]


def plot(found: dict[str, dict[str, Any]]) -> None:
    """The first seed of every arm, in one scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    panels = figure.subplots(1, len(ARMS), sharey=True)
    firsts = [next(u for u in found.values() if u["arm"] == name and u["seed"] == SEEDS[0]) for name in ARMS]
    far = max(abs(g - 1) for u in firsts for layer in u["gate_of_layer_and_slot"] for g in layer)
    for axes, unit in zip(panels, firsts, strict=True):
        gates = unit["gate_of_layer_and_slot"]
        image = axes.imshow(gates, cmap="RdBu_r", vmin=1 - far, vmax=1 + far, origin="lower", aspect="auto")
        axes.set_xticks(range(0, len(gates[0]), 5))
        axes.set_yticks(range(len(gates)))
        axes.set_title(unit["arm"], fontsize=9)
        axes.set_xlabel("slot")
    panels[0].set_ylabel("layer")
    figure.colorbar(image, ax=panels, label="gate (1: prefix-tuning)")
    figure.savefig(RESULTS / "gates.png", dpi=130)


if __name__ == "__main__":
    main()
