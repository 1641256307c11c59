"""Triples of UMLS, true or false: PALT beside full fine-tuning and LoRA.

    python experiments/umls.py path/to/umls_kg

MiniLM (22 M, an encoder), one epoch of the 5,216 training triples, a two-way head trained in every arm. PALT's released
code draws five false triples for each of head, relation and tail; here it is one, a quarter of the time (`NEGATIVES`).
The learning rate is the best of three by the loss on 100 dev triples, and as many false ones for each place (of which
some may be true by the other files), after two fifths of an epoch with a schedule of their own. On the test set:
filtered MR, MRR and Hits@1, 3, 10 over the heads and tails of 100 triples of 661, drawn once, the same for all arms;
and the accuracy of telling all test triples from as many false ones, with a threshold that is chosen on the dev set.
What an arm costs is measured apart, all arms in turns: a unit's seconds say what else the machine did.
Writes `results/umls/`; minutes on an accelerator, forty on two cores (two processes with one thread each).
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import antefix
from antefix.attach import attached
from antefix.benchmarks.rounds import Spread, interleave
from antefix.data.example import Example
from antefix.link_prediction import Likelihood, classification_scores, likelihoods, link_scores
from antefix.tasks.triples import Triple, true_triples, with_one_negative
from antefix.training.loop import StepReport
from antefix.training.recipe import TrainingRecipe

from units import ROOT, Unit, announce, best_rate, finish  # isort: skip

RESULTS = ROOT / "results" / "umls"
ARMS = ("palt", "lora", "full")
RATES = {"palt": (1e-4, 3e-4, 1e-3), "lora": (1e-3, 3e-3, 1e-2), "full": (3e-5, 1e-4, 3e-4)}
NEGATIVES, EPOCHS, SEARCH_EPOCHS = 1, 1.0, 0.4
DEV, RANKED = 100, 100
ROUNDS, TIMED = 5, 160
"""Of the measurement of costs, and how many true triples a round trains on and scores."""
SECONDS_A_STEP = {"palt": 1.4, "lora": 0.5, "full": 1.0}
"""On one core, for the estimate."""
STEPS = 5216 * (1 + 3 * NEGATIVES) // 32


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1]).resolve()
    searches = {
        f"search_{arm}_{number}": Unit(partial(search, folder, arm, rate), seconds(arm, SEARCH_EPOCHS))
        for arm in ARMS
        for number, rate in enumerate(RATES[arm])
    }
    ranking = 600.0
    expected = {f"final_{arm}": Unit(dict, seconds(arm, EPOCHS) + ranking) for arm in ARMS}
    expected["costs"] = Unit(dict, ROUNDS * sum(seconds(arm, TIMED / len(data(folder)[0])) for arm in ARMS))
    announce(RESULTS / "units", searches | expected)
    found = finish(RESULTS / "units", searches)
    finals = {f"final_{arm}": Unit(partial(final, folder, arm, best_rate(found, f"search_{arm}")), 0.0) for arm in ARMS}
    done = finish(RESULTS / "units", finals | {"costs": Unit(partial(costs, folder), 0.0)})
    done["guess"] = {"links": {"mr": links_of(lambda triples: [0.5] * len(triples), *data(folder))["mr"]}}
    (RESULTS / "summary.json").write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")


def seconds(arm: str, epochs: float) -> float:
    return SECONDS_A_STEP[arm] * STEPS * epochs


def data(folder: Path) -> tuple[list[Example], list[Example], list[Example]]:
    """Training, dev and test triples."""
    train, dev, test = (antefix.read(folder / f"{name}.tsv") for name in ("train", "dev", "test"))
    return train, dev, test


def trained(
    base: antefix.Base, train: Sequence[Example], dev: Sequence[Example], arm: str, rate: float, epochs: float
) -> antefix.Prefix:
    """With the dev loss measured at the end, on some of the dev triples."""
    training = TrainingRecipe(
        epochs=epochs, learning_rate=rate, pairs_per_step=32, tokens_per_batch=2048, evaluations=1, negatives=NEGATIVES
    )
    return antefix.train(base, train, dev=drawn(dev, DEV), method=arm, task="triples", training=training)


def search(folder: Path, arm: str, rate: float) -> dict[str, Any]:
    train, dev, _ = data(folder)
    prefix = trained(antefix.load_base("minilm-l6", device="auto"), train, dev, arm, rate, SEARCH_EPOCHS)
    (score,) = prefix.card.scores["dev"]
    return {"arm": arm, "learning_rate": rate, "dev_loss": score["dev_loss"]}


def final(folder: Path, arm: str, rate: float) -> dict[str, Any]:
    """Train, and score on the test set."""
    base = antefix.load_base("minilm-l6", device="auto")
    train, dev, test = data(folder)
    started = time.perf_counter()
    prefix = trained(base, train, dev, arm, rate, EPOCHS)
    trained_at = time.perf_counter()
    with attached(base.model, prefix):
        likelihood = partial(likelihoods, base)
        links = links_of(likelihood, train, dev, test)
        ranked_at = time.perf_counter()
        known = set(true_triples([*train, *dev, *test]))
        told_apart = classification_scores(likelihood, *(with_one_negative(some, known, 0) for some in (dev, test)))
    (score,) = prefix.card.scores["dev"]
    return {
        "arm": arm,
        "learning_rate": rate,
        "epochs": EPOCHS,
        "negatives": NEGATIVES,
        "dev_loss": score["dev_loss"],
        "links": {"ranked": RANKED, "of": len(test), **links},
        "triples": told_apart,
        "trained_values": prefix.card.training["trained"],
        "stored_values": prefix.num_values,
        "seconds_of_training": round(trained_at - started, 1),
        "seconds_of_ranking": round(ranked_at - trained_at, 1),
    }


def links_of(
    likelihood: Likelihood, train: Sequence[Example], dev: Sequence[Example], test: Sequence[Example]
) -> dict[str, float]:
    """Ranks of some test triples' heads and tails, all that is known to be true left out."""
    return link_scores(likelihood, drawn(test, RANKED), [*train, *dev, *test])


def costs(folder: Path) -> dict[str, Any]:
    """Triples a second that every arm trains on, and that it scores, all in turns; the rates do not matter for it."""
    train, _, test = data(folder)
    bases = {arm: antefix.load_base("minilm-l6", device="auto") for arm in ARMS}
    some = true_triples(test[:TIMED])
    trained_a_second = interleave({arm: partial(steps_timed, bases[arm], train[:TIMED], arm) for arm in ARMS}, ROUNDS)
    scored = {}
    for arm in ARMS:
        prefix = trained(bases[arm], train[:TIMED], test, arm, RATES[arm][0], EPOCHS)
        scored[arm] = partial(scores_timed, bases[arm], prefix, some)
    found = {"trained_a_second": trained_a_second, "scored_a_second": interleave(scored, ROUNDS)}
    return {name: {arm: asdict(Spread.of(rates)) for arm, rates in by_arm.items()} for name, by_arm in found.items()}


def steps_timed(base: antefix.Base, train: Sequence[Example], arm: str, number: int) -> float:
    """Triples a second of some steps, true and false ones together."""
    training = TrainingRecipe(
        epochs=EPOCHS, learning_rate=RATES[arm][0], pairs_per_step=32, tokens_per_batch=2048, evaluations=0,
        negatives=NEGATIVES,
    )  # fmt: skip
    reports: list[StepReport] = []
    antefix.train(base, train, dev=(), method=arm, task="triples", training=training, watch=reports.append)
    return reports[-1].pairs_per_second


def scores_timed(base: antefix.Base, prefix: antefix.Prefix, triples: Sequence[Triple], number: int) -> float:
    """Triples a second."""
    started = time.perf_counter()
    with attached(base.model, prefix):
        likelihoods(base, triples)
    return len(triples) / (time.perf_counter() - started)


def drawn(examples: Sequence[Example], count: int) -> list[Example]:
    """So many, always the same."""
    return random.Random(0).sample(examples, count)


if __name__ == "__main__":
    main()
