"""SST-2 from 16 sentences of each class: methods with gradients, without gradients, and T-Few.

    python experiments/few_shot.py path/to/sst2_16shot

SmolLM2-135M in float32, three of T-Few's draws, the same 500 test sentences for all. A label's score is the logit of
its word behind `SENTENCE It was`, and no head is learned; (IA)^3 ranks the same words with T-Few's losses and recipe
(`t_few`). Every method has its default size.

Methods with gradients take 120 steps of eight sentences; the learning rate is the best of three on the first draw,
after a third of the steps with a schedule of their own. Dev set, for rates and for the step that is kept: as many
sentences as are trained on. Black-box tuning tries 600 candidates (8,000 in the papers): 30 generations of BBT, and
only one for each of 30 layers of BBTv2. A forward call is one candidate on all training sentences; those on the dev set
are not counted. Budgets differ: T-Few sees 8,000 sentences, other methods with gradients 960, a search 19,200 without
gradients. Beside them the base as it is, by a word's logit and by ranking, and the largest class. Seconds can be
compared on one machine alone.

Writes `results/few_shot/`; minutes on an accelerator, three and a half hours on two
cores (two processes with one thread each).
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import antefix
from antefix.attach import attached
from antefix.choices import choose_each
from antefix.data.example import Example
from antefix.data.linearise import TextFormat
from antefix.metrics import score
from antefix.tasks import RankingTask
from antefix.training.prepared import prepare
from antefix.training.recipe import BlackBoxRecipe, TrainingRecipe

import t_few  # isort: skip
from few_labels import CLASSES, kept_dev_loss, rates, sentiment  # isort: skip
from smollm import READ, TRAINED, smollm  # isort: skip
from umls import drawn  # isort: skip
from units import ROOT, Unit, announce, best_rate, finish, work_folder  # isort: skip

RESULTS = ROOT / "results" / "few_shot"
SEARCHED = ("p_tuning_v2", "prompt_tuning", "prefix_tuning", "bitfit", "lora", "full")
RANKED, BLACK_BOX = "ia3", ("bbt", "bbt_v2")
ARMS = (*SEARCHED, RANKED, *BLACK_BOX)
DRAWS = (0, 1, 32)
DEV_OF_A_CLASS, TEST = 16, 500
EPOCHS, SEARCH_EPOCHS, EVALUATIONS = 30.0, 10.0, 4
CANDIDATES, POPULATION = 600, 20
WORDS = {"negative": " bad", "positive": " great"}
FORMAT = TextFormat(separator=" It was")
TRAIN_TOKENS, TEST_TOKENS, PROMPT_TOKENS = 17, 29, 50
"""Of a sentence with its separator, and of the searched prompt, which is read once a candidate."""


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1]).resolve()
    searches = {
        f"search_{arm}_{number}": Unit(partial(search, folder, arm, rate), seconds(arm, SEARCH_EPOCHS))
        for arm in SEARCHED
        for number, rate in enumerate(rates(arm))
    }
    tested = TEST * TEST_TOKENS / READ
    names = {f"final_{arm}_{draw}": (arm, draw) for arm in ARMS for draw in DRAWS}
    expected = {name: seconds(arm, EPOCHS) + tested for name, (arm, _) in names.items()} | {"untrained": 2 * tested}
    announce(RESULTS / "units", searches | {name: Unit(dict, left) for name, left in expected.items()})
    found = finish(RESULTS / "units", searches)
    best = {arm: best_rate(found, f"search_{arm}") for arm in SEARCHED}  # others have a rate of their own, or none
    finals = {name: Unit(partial(final, folder, arm, best.get(arm), draw), 0.0) for name, (arm, draw) in names.items()}
    finals["untrained"] = Unit(partial(untrained, folder), 2 * tested)
    summary = summed(finish(RESULTS / "units", finals), majority(folder), {arm: rates(arm) for arm in SEARCHED})
    (RESULTS / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    plot(summary, RESULTS / "few_shot.png")


def seconds(arm: str, epochs: float) -> float:
    """Of training, for the estimate."""
    if arm == RANKED:
        return t_few.STEPS * t_few.EXAMPLES_A_STEP * (TRAIN_TOKENS + 2 * len(WORDS)) / t_few.TRAINED
    sentences = len(CLASSES) * 16
    evaluated = EVALUATIONS * sentences * TEST_TOKENS / READ
    if arm in BLACK_BOX:
        return evaluated + CANDIDATES * (sentences * TRAIN_TOKENS + PROMPT_TOKENS) / READ
    return evaluated + epochs * sentences * TRAIN_TOKENS / TRAINED * (1.5 if arm == "full" else 1.0)


def data(folder: Path, draw: int) -> tuple[list[Example], list[Example], list[Example]]:
    """The training sentences of a draw, as many dev sentences, the test sentences."""
    train, dev, test = sentiment(folder, draw)
    few = [e for label in CLASSES for e in [d for d in dev if d.targets == (label,)][:DEV_OF_A_CLASS]]
    return train, few, drawn(test, TEST)


def with_choices(examples: Sequence[Example]) -> list[Example]:
    """The words to choose from, in the place of labels."""
    return [replace(e, targets=(WORDS[e.targets[0]],), choices=tuple(WORDS.values())) for e in examples]


def trained(
    base: antefix.Base, train: Sequence[Example], dev: Sequence[Example], arm: str, rate: float | None, draw: int,
    epochs: float, run_folder: Path | None = None,
) -> antefix.Prefix:  # fmt: skip
    """By labels' words."""
    training = TrainingRecipe(
        epochs=epochs, learning_rate=rate, seed=draw, evaluations=EVALUATIONS, pairs_per_step=8,
        black_box=BlackBoxRecipe(candidates=CANDIDATES, population=POPULATION),
    )  # fmt: skip
    config = {"seed": draw} if arm in BLACK_BOX else {}
    return antefix.train(
        base, train, dev=dev, method=arm, task="classification", words=WORDS, text_format=FORMAT, training=training,
        run_folder=run_folder, **config,
    )  # fmt: skip


def search(folder: Path, arm: str, rate: float) -> dict[str, Any]:
    train, dev, _ = data(folder, DRAWS[0])
    prefix = trained(smollm(), train, dev, arm, rate, DRAWS[0], SEARCH_EPOCHS)
    return {"arm": arm, "learning_rate": rate, "dev_loss": kept_dev_loss(prefix)}


def final(folder: Path, arm: str, rate: float | None, draw: int) -> dict[str, Any]:
    """Train, and label the test sentences."""
    base = smollm()
    train, dev, test = data(folder, draw)
    with work_folder("few_shot", f"{arm}_{draw}") as work:
        if arm == RANKED:
            test = with_choices(test)
            prefix = t_few.trained(base, with_choices(train), FORMAT, seed=draw, run_folder=work)
        else:
            prefix = trained(base, train, dev, arm, rate, draw, EPOCHS, work)
    with attached(base.model, prefix):
        labels = antefix.label(base, test)
    found: dict[str, Any] = {
        "arm": arm,
        "draw": draw,
        "learning_rate": prefix.card.training.get("learning_rate"),
        "accuracy": score([e.targets for e in test], labels, ["accuracy"])["accuracy"],
        "trained_values": prefix.card.training["trained"],
        "stored_values": prefix.num_values,
        "steps": prefix.card.training["steps"],
        "kept_step": prefix.card.training["kept_step"],
        "seconds_of_training": prefix.card.training["seconds"],
    }
    if arm in BLACK_BOX:  # a step is a generation
        found["forward_calls"] = prefix.card.training["steps"] * POPULATION
    return found


def untrained(folder: Path) -> dict[str, Any]:
    """By the base alone: which word has the larger logit, and which is likelier as (IA)^3 ranks them."""
    train, dev, test = data(folder, DRAWS[0])
    base = smollm()
    # Zero biases, so that there is something with words to attach.
    as_it_is = prepare(
        base, train, dev, method="bitfit", config={}, text_format=FORMAT, decoding=None, training=TrainingRecipe(),
        task="classification", words=WORDS,
    )  # fmt: skip
    with attached(base.model, as_it_is.module):
        by_logit = antefix.label(base, test, task=as_it_is.task, text_format=FORMAT)
    choices = with_choices(test)
    taken = dict(choose_each(base, choices, RankingTask(), FORMAT))
    by_rank = [taken[n] for n in range(len(test))]
    return {
        "accuracy": score([e.targets for e in test], by_logit, ["accuracy"])["accuracy"],
        "accuracy_of_ranking": score([e.targets for e in choices], by_rank, ["accuracy"])["accuracy"],
    }


def examples_seen(arm: str, unit: dict[str, Any]) -> int:
    """In training, each as often as it was seen."""
    if arm in BLACK_BOX:
        return int(unit["forward_calls"]) * len(CLASSES) * 16
    return int(unit["steps"]) * t_few.EXAMPLES_A_STEP


def majority(folder: Path) -> float:
    """The share of the class that most test sentences have."""
    _, _, test = data(folder, DRAWS[0])
    return max(Counter(e.targets[0] for e in test).values()) / len(test)


def summed(
    found: dict[str, dict[str, Any]], largest_class: float, rates_tried: dict[str, list[float]]
) -> dict[str, Any]:
    """Of every arm the accuracy over draws, and what it took."""
    summary: dict[str, Any] = {
        "majority": {"mean": largest_class},
        "untrained": {"mean": round(found["untrained"]["accuracy"], 4)},
        "untrained_ranking": {"mean": round(found["untrained"]["accuracy_of_ranking"], 4)},
    }
    for arm in ARMS:
        units = [found[f"final_{arm}_{draw}"] for draw in DRAWS]
        accuracies = [u["accuracy"] for u in units]
        summary[arm] = {
            "accuracy": [round(a, 4) for a in accuracies],
            "mean": round(statistics.mean(accuracies), 4),
            "standard_deviation": round(statistics.stdev(accuracies), 4),
            "examples_seen": examples_seen(arm, units[0]),
            "kept_steps": [u["kept_step"] for u in units],
            "seconds_of_training": [u["seconds_of_training"] for u in units],
            "machines": [u["made_with"].get("accelerator", u["made_with"]["processor"]) for u in units],
        }
        if tried := rates_tried.get(arm):
            summary[arm]["best_of_the_rates_at_an_end"] = units[0]["learning_rate"] in (min(tried), max(tried))
        summary[arm] |= {
            name: units[0][name]
            for name in ("learning_rate", "trained_values", "stored_values", "steps", "forward_calls")
            if name in units[0] and not (name == "learning_rate" and arm in BLACK_BOX)
        }
    return summary


def plot(summary: dict[str, Any], path: Path) -> None:
    """A dot for every draw, a line at their mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    for place, arm in enumerate(ARMS):
        axes.scatter([place] * len(DRAWS), summary[arm]["accuracy"], s=18)
        axes.hlines(summary[arm]["mean"], place - 0.3, place + 0.3, colors="black", linewidth=1)
    for name, line, label in (
        ("majority", ":", "largest class"), ("untrained", "--", "the base as it is"),
        ("untrained_ranking", "-.", "the base as it is, by ranking"),
    ):  # fmt: skip
        axes.axhline(summary[name]["mean"], color="grey", linestyle=line, label=label)
    axes.set_xticks(range(len(ARMS)), ARMS, rotation=30, ha="right")
    axes.set_ylabel(f"accuracy on {TEST} sentences")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
