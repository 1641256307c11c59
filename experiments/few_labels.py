"""Labels from few examples: P-tuning v2 and prompt tuning beside prefix-tuning and the label head alone.

    python experiments/few_labels.py path/to/sst2_16shot path/to/wnut17

SST-2 with 16 sentences of each class (T-Few's five draws) and the 1,821 test sentences; names in noisy texts (WNUT-17)
with all of its training sentences (3,291 unlike ones). MiniLM (22 M, an encoder), ten slots, the head trained in every
arm. The learning rate is the best of three by the loss on 200 dev sentences (SST-2 on the first draw), and is then used
for all draws or seeds. Writes `results/few_labels/`; about half an hour on two cores.
"""

from __future__ import annotations

import gzip
import json
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import antefix
from antefix.attach import attached
from antefix.data.example import Example
from antefix.methods import method_class
from antefix.metrics import score
from antefix.tasks import METRICS_OF
from antefix.tasks.label import LabelTaskName
from antefix.training.prepared import prepare
from antefix.training.recipe import TrainingRecipe
from antefix.training.run import run

from units import ROOT, Unit, announce, best_rate, finish  # isort: skip

RESULTS = ROOT / "results" / "few_labels"
HEAD_ALONE = "head_alone"
ARMS = ("p_tuning_v2", "prompt_tuning", "prefix_tuning", HEAD_ALONE)
TASKS: tuple[LabelTaskName, ...] = ("classification", "tagging")
DRAWS, SEEDS = (0, 1, 32, 42, 1024), (0, 1, 2)
FACTORS = (1 / 3, 1.0, 3.0)
SLOTS, DEV = 10, 200
EPOCHS = {"classification": 60.0, "tagging": 3.0}
CLASSES = ("negative", "positive")


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    folders = tuple(Path(a).resolve() for a in sys.argv[1:])
    searches = {
        f"search_{task}_{arm}_{number}": Unit(partial(one, folders, task, arm, rate, 0, is_final=False), 40.0)
        for task in TASKS
        for arm in ARMS
        for number, rate in enumerate(rates(arm))
    }
    announce(RESULTS / "units", searches | {name: Unit(dict, 50.0) for name in final_names()})
    found = finish(RESULTS / "units", searches)
    finals = {
        name: Unit(
            partial(one, folders, task, arm, best_rate(found, f"search_{task}_{arm}"), number, is_final=True), 50.0
        )
        for name, (task, arm, number) in final_names().items()
    }
    summary = summed(finish(RESULTS / "units", finals))
    (RESULTS / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def rates(arm: str) -> list[float]:
    """Of three; the head alone has the default of the prefix that it leaves as it is."""
    found = method_class("p_tuning_v2" if arm == HEAD_ALONE else arm)
    return [found.default_learning_rate(found.Config.model_validate({})) * factor for factor in FACTORS]


def final_names() -> dict[str, tuple[LabelTaskName, str, int]]:
    """Name -> task, arm, draw or seed."""
    return {
        f"final_{task}_{arm}_{number}": (task, arm, number)
        for task in TASKS
        for arm in ARMS
        for number in (DRAWS if task == "classification" else SEEDS)
    }


def one(
    folders: Sequence[Path], task: LabelTaskName, arm: str, rate: float, number: int, *, is_final: bool
) -> dict[str, Any]:
    """Train; the dev loss, and at the end scores of the test set. number: the draw (SST-2) or the seed (WNUT-17)."""
    base = antefix.load_base("minilm-l6")
    train, dev, test = sentiment(folders[0], number) if task == "classification" else names(folders[1])
    training = TrainingRecipe(
        epochs=EPOCHS[task], learning_rate=rate, seed=number, evaluations=6, pairs_per_step=16, tokens_per_batch=2048
    )
    method = "p_tuning_v2" if arm == HEAD_ALONE else arm
    prepared = prepare(
        base, train, dev, method=method, config={"num_virtual_tokens": SLOTS}, text_format=None, decoding=None,
        training=training, task=task,
    )  # fmt: skip
    if arm == HEAD_ALONE:
        for name, parameter in prepared.module.named_parameters():
            parameter.requires_grad_(name.startswith("head."))
    prefix = run(prepared)
    made = {"task": task, "arm": arm, "draw_or_seed": number, "learning_rate": rate}
    found: dict[str, Any] = {**made, "dev_loss": kept_dev_loss(prefix)}
    if is_final:
        with attached(base.model, prefix):
            labels = antefix.label(base, test)
        found["test"] = score([e.targets for e in test], labels, list(METRICS_OF[task]))
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


def names(folder: Path) -> tuple[list[Example], list[Example], list[Example]]:
    """All training sentences, some dev sentences, all test sentences."""
    work = ROOT / "experiments" / "work"
    work.mkdir(parents=True, exist_ok=True)
    as_conll = work / "wnut17_test.conll"  # the file's own name ends in .annotated
    as_conll.write_bytes(gzip.decompress((folder / "emerging.test.annotated.gz").read_bytes()))
    train, dev, test = (
        antefix.read(str(path))
        for path in (folder / "wnut17train.conll.gz", folder / "emerging.dev.conll.gz", as_conll)
    )
    return list(train), list(dev)[::5][:DEV], list(test)


def summed(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation of the test scores over draws or seeds."""
    summary: dict[str, Any] = {}
    for task in TASKS:
        for arm in ARMS:
            units = [u for u in found.values() if (u["task"], u["arm"]) == (task, arm)]
            for metric in METRICS_OF[task]:
                values = [u["test"][metric] for u in units]
                summary.setdefault(task, {}).setdefault(arm, {})[metric] = {
                    "mean": round(statistics.mean(values), 4),
                    "standard_deviation": round(statistics.stdev(values), 4),
                    "all": [round(v, 4) for v in values],
                }
    return summary


if __name__ == "__main__":
    main()
