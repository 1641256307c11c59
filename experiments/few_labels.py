"""Labels from few examples: P-tuning v2 and prompt tuning beside prefix-tuning and the label head alone.

    python experiments/few_labels.py path/to/sst2_16shot

SST-2 with 16 sentences of each class (T-Few's five draws) and the 1,821 test sentences. MiniLM (22 M, an encoder), ten
slots, the head trained in every arm. The learning rate is the best of three by the loss on 200 dev sentences, on the
first draw, and is then used for all. Writes `results/few_labels/`; half an hour on two cores.
"""

from __future__ import annotations

import json
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import antefix
from antefix.attach import attached
from antefix.data.example import Example
from antefix.methods import method_class
from antefix.metrics import score
from antefix.tasks import TASKS
from antefix.training.prepared import prepare
from antefix.training.recipe import TrainingRecipe
from antefix.training.run import run

from units import ROOT, Unit, announce, best_rate, finish  # isort: skip

RESULTS = ROOT / "results" / "few_labels"
HEAD_ALONE = "head_alone"
ARMS = ("p_tuning_v2", "prompt_tuning", "prefix_tuning", HEAD_ALONE)
DRAWS = (0, 1, 32, 42, 1024)
FACTORS = (1 / 3, 1.0, 3.0)
SLOTS, DEV = 10, 200
EPOCHS = 60.0
CLASSES = ("negative", "positive")


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1]).resolve()
    searches = {
        f"search_{arm}_{number}": Unit(partial(one, folder, arm, rate, DRAWS[0], is_final=False), 80.0)
        for arm in ARMS
        for number, rate in enumerate(rates(arm))
    }
    names = {f"final_{arm}_{draw}": (arm, draw) for arm in ARMS for draw in DRAWS}
    announce(RESULTS / "units", searches | {name: Unit(dict, 110.0) for name in names})
    found = finish(RESULTS / "units", searches)
    finals = {
        name: Unit(partial(one, folder, arm, best_rate(found, f"search_{arm}"), draw, is_final=True), 110.0)
        for name, (arm, draw) in names.items()
    }
    summary = summed(finish(RESULTS / "units", finals))
    (RESULTS / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def rates(arm: str) -> list[float]:
    """Of three; the head alone has the default of the prefix that it leaves as it is."""
    found = method_class("p_tuning_v2" if arm == HEAD_ALONE else arm)
    return [found.default_learning_rate(found.Config.model_validate({})) * factor for factor in FACTORS]


def one(folder: Path, arm: str, rate: float, draw: int, *, is_final: bool) -> dict[str, Any]:
    """Train; the dev loss, and at the end scores of the test set."""
    base = antefix.load_base("minilm-l6")
    train, dev, test = sentiment(folder, draw)
    training = TrainingRecipe(
        epochs=EPOCHS, learning_rate=rate, seed=draw, evaluations=6, pairs_per_step=16, tokens_per_batch=2048
    )
    method = "llama_adapter" if arm == HEAD_ALONE else arm  # with gates at zero it is the base to the bit
    prepared = prepare(
        base, train, dev, method=method, config={"num_virtual_tokens": SLOTS}, text_format=None, decoding=None,
        training=training, task="classification",
    )  # fmt: skip
    if arm == HEAD_ALONE:
        for name, parameter in prepared.module.named_parameters():
            parameter.requires_grad_(name.startswith("head."))
    prefix = run(prepared)
    found: dict[str, Any] = {"arm": arm, "draw": draw, "learning_rate": rate, "dev_loss": kept_dev_loss(prefix)}
    if is_final:
        with attached(base.model, prefix):
            labels = antefix.label(base, test)
        found["test"] = score([e.targets for e in test], labels, list(TASKS["classification"].metrics))
    return found


def kept_dev_loss(prefix: antefix.Prefix) -> float:
    """Of the step that was kept."""
    return float(min(score["dev_loss"] for score in prefix.card.scores["dev"]))


def sentiment(folder: Path, draw: int) -> tuple[list[Example], list[Example], list[Example]]:
    """32 training sentences, dev and test sentences."""
    rows = [json.loads(line) for line in (folder / f"{draw}_seed.jsonl").read_text(encoding="utf-8").splitlines()]
    train = [Example(source=r["sentence"].strip(), targets=(CLASSES[r["label"]],)) for r in rows]
    dev, test = (
        [
            Example(source=line[2:], targets=(CLASSES[int(line[0])],))
            for line in (folder / f"stsa.binary.{name}").read_text(encoding="utf-8").splitlines()
        ]
        for name in ("dev", "test")
    )
    step = len(dev) // DEV
    return train, dev[::step][:DEV], test


def summed(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation of the test scores over the draws."""
    summary: dict[str, Any] = {}
    for arm in ARMS:
        for metric in TASKS["classification"].metrics:
            values = [u["test"][metric] for u in found.values() if u["arm"] == arm]
            summary.setdefault(arm, {})[metric] = {
                "mean": round(statistics.mean(values), 4),
                "standard_deviation": round(statistics.stdev(values), 4),
                "all": [round(v, 4) for v in values],
            }
    return summary


if __name__ == "__main__":
    main()
