"""Black-box tuning: the candidates of a generation in one batch, beside one candidate after another.

    python experiments/population.py path/to/sst2_16shot

SmolLM2-135M in float32, the task of `few_shot.py`: 20 candidates of a prompt, each on 32 sentences. One after another
still reads its sentences in one batch, so the ratio says what mixing prompts in a batch gains or costs, not what
batches do. Both take turns, a generation each, in six rounds. Finished rounds are kept in `results/population/`, those
of an accelerator in `results/population_on_cuda/`; ten minutes on two cores, in one process on a machine
that does nothing else.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

import antefix
from antefix.benchmarks.rounds import Kept, Spread, interleave
from antefix.data.example import Example
from antefix.training.loop import StepReport
from antefix.training.recipe import BlackBoxRecipe, TrainingRecipe

from few_labels import sentiment  # isort: skip
from few_shot import FORMAT, POPULATION, PROMPT_TOKENS, TRAIN_TOKENS, WORDS  # isort: skip
from smollm import READ, smollm  # isort: skip
from units import ROOT, Unit, announce, finish, made_with  # isort: skip

RESULTS = ROOT / "results" / ("population_on_cuda" if torch.cuda.is_available() else "population")
ROUNDS = 6
ARMS = {"one_batch": None, "one_by_one": 1}
"""How many candidates share a batch; None: all."""


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    train, _, _ = sentiment(Path(sys.argv[1]).resolve(), 0)
    generation = POPULATION * (len(train) * TRAIN_TOKENS + PROMPT_TOKENS) / READ
    units = {"rounds": Unit(partial(measured, train), ROUNDS * len(ARMS) * generation)}
    announce(RESULTS / "units", units)
    found = finish(RESULTS / "units", units)
    (RESULTS / "summary.json").write_text(json.dumps(found["rounds"], indent=1) + "\n", encoding="utf-8")


def measured(train: Sequence[Example]) -> dict[str, Any]:
    """Candidates a second of both, and their ratio within rounds."""
    base = smollm()
    arms = {name: partial(candidates_a_second, base, train, at_once) for name, at_once in ARMS.items()}
    settings = {"population": POPULATION, "sentences": len(train), **made_with()}
    rates = interleave(arms, ROUNDS, kept=Kept(RESULTS, settings))
    ratios = [together / alone for together, alone in zip(rates["one_batch"], rates["one_by_one"], strict=True)]
    return {
        "settings": settings,
        "candidates_a_second": {name: asdict(Spread.of(found)) for name, found in rates.items()},
        "ratio": asdict(Spread.of(ratios)),
    }


def candidates_a_second(base: antefix.Base, train: Sequence[Example], at_once: int | None, number: int) -> float:
    """Of one generation; both arms have the same candidates in a round."""
    training = TrainingRecipe(
        seed=number, evaluations=0,
        black_box=BlackBoxRecipe(candidates=POPULATION, population=POPULATION, at_once=at_once),
    )  # fmt: skip
    reports: list[StepReport] = []
    antefix.train(
        base, train, dev=(), method="bbt", task="classification", words=WORDS, text_format=FORMAT, training=training,
        watch=reports.append,
    )  # fmt: skip
    return reports[-1].pairs_per_second / len(train)


if __name__ == "__main__":
    main()
