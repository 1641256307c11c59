"""Many prefixes trained together against one after another: the same users, pairs, steps and base.

    python experiments/many_at_once.py path/to/e2e-dataset.zip

64 users (E2E by name and price range), 16 pairs and as many steps as make two epochs each, SmolLM2-135M in float32,
in rounds of 16 users: in each round both arms train the same users, in turns; only the ratio within a round counts.
The users' steps have 4 pairs; that is the size that the ratio is about, with one round of 2 beside it (a step of all
16 pairs fills a forward pass alone, and nothing is shared). Both arms are given the fresh prefix and the loaded base;
what is compared is preparing the users' data, their steps, and nothing else. On a processor a run first asks the base
whether it takes packed rows, alone for every user, together once: that time is measured and left out of the ratio.
`ratio_with_asking` has it in. Tensors of both arms are compared as well.

Finished rounds are kept in `results/many_at_once/`, all of them in `results/many_at_once.json`. `--users 4 --round 2`
tries it. On two cores that do nothing else about half an hour.

    python experiments/many_at_once.py path/to/e2e-dataset.zip --device cuda --round 64 --tokens-per-batch 16384

On an accelerator one round of all users, in minutes, is kept in `results/many_at_once_on_cuda/`. The first two users
are trained once before anything is timed, since an accelerator's first steps are slow.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import Tensor

from antefix import atomic
from antefix.base import Base, load_base
from antefix.batches.form import BatchForm, batch_form
from antefix.data import sample_pairs
from antefix.prefix import Prefix
from antefix.training import loop, team
from antefix.training.many import train_many
from antefix.training.many_run import ManyPlan, plan_many, work_of
from antefix.training.recipe import Recipe
from antefix.training.run import run
from antefix.training.users import User, Users, users_of

from units import ROOT, Unit, announce, commit, finish, made_with  # isort: skip

PAIRS, EPOCHS = 16, 2
PAIRS_PER_STEP = (4, 2)
SECONDS_A_PAIR = 0.25
"""Of a pair in one arm's training on two cores, for the estimate."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data")
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--round", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens-per-batch", type=int, default=1024)
    options = parser.parse_args()
    name = "many_at_once" if options.device == "cpu" else f"many_at_once_on_{options.device}"
    folder, tokens = ROOT / "results" / name, options.tokens_per_batch
    base = load_base("smollm2-135m", dtype="float32", device=options.device)
    users = users_of_e2e(options.data)[: options.users]
    rounds = [users[first : first + options.round] for first in range(0, len(users), options.round)]
    seconds = 2 * options.round * PAIRS * EPOCHS * SECONDS_A_PAIR
    units = {
        f"{pairs}_pairs_{options.round}_users_{n}": Unit(partial(one_round, base, some, pairs, n, tokens), seconds)
        for pairs in PAIRS_PER_STEP
        for n, some in enumerate(rounds if pairs == PAIRS_PER_STEP[0] else rounds[:1])
    }
    announce(folder, units)
    if options.device != "cpu":
        one_round(base, users[:2], PAIRS_PER_STEP[0], 0, tokens)
    found = finish(folder, units)
    result = {
        "users": len(users), "users_in_round": options.round, "pairs_each": PAIRS, "epochs": EPOCHS,
        "tokens_per_batch": tokens,
        "together_is_faster_by": {
            f"steps of {pairs} pairs": spread([one for name, one in found.items() if name.startswith(f"{pairs}_")])
            for pairs in PAIRS_PER_STEP
        },
        "commit": commit(), "made_with": made_with(),
    }  # fmt: skip
    atomic.write_bytes(folder.with_suffix(".json"), f"{json.dumps(result, indent=1)}\n".encode())
    print(json.dumps(result["together_is_faster_by"], indent=1))


def users_of_e2e(data: str) -> list[User]:
    """Of 16 pairs each, without a dev set."""
    everybody = users_of(recipe_of(PAIRS_PER_STEP[0], data=data), ("name", "priceRange"), PAIRS)
    whole = [(user, [*user.train, *user.dev]) for user in everybody.users]
    return [replace(user, train=tuple(sample_pairs(some, PAIRS, 0)), dev=()) for user, some in whole]


def recipe_of(pairs_per_step: int, tokens_per_batch: int = 1024, data: str = "none") -> Recipe:
    """Ten slots; the data are given."""
    training = {
        "max_steps": EPOCHS * PAIRS // pairs_per_step, "pairs_per_step": pairs_per_step, "evaluations": 0,
        "tokens_per_batch": tokens_per_batch,
    }  # fmt: skip
    return Recipe.model_validate(
        {
            "name": "many", "base": "smollm2-135m", "dtype": "float32", "bank": "none", "run": "none",
            "data": {"train": f"{Path(data).resolve()}::trainset.csv"}, "training": training,
        }
    )  # fmt: skip


def one_round(
    base: Base, users: Sequence[User], pairs_per_step: int, number: int, tokens_per_batch: int
) -> dict[str, Any]:
    """Both arms, the first of them in turns."""
    plan = plan_many(recipe_of(pairs_per_step, tokens_per_batch), Users(list(users), [], {}))
    arms = {"together": together, "one_after_another": one_after_another}
    seconds, of_asking, tensors = {}, {}, {}
    for name in list(arms)[:: -1 if number % 2 else 1]:
        with timed_asking() as asking:
            started = time.perf_counter()
            tensors[name] = arms[name](base, plan)
            seconds[name] = time.perf_counter() - started
        of_asking[name] = sum(asking)
    first, second = tensors.values()
    of_steps = {name: seconds[name] - of_asking[name] for name in arms}
    return {
        "seconds_of": seconds,
        "seconds_of_asking": of_asking,
        "ratio": of_steps["one_after_another"] / of_steps["together"],
        "ratio_with_asking": seconds["one_after_another"] / seconds["together"],
        "largest_relative_difference": max(
            float((t - second[user][n]).norm() / t.norm()) for user, kept in first.items() for n, t in kept.items()
        ),
    }


@contextmanager
def timed_asking() -> Iterator[list[float]]:
    """The seconds of every question which form of batch a base takes."""
    seconds: list[float] = []

    def timed(*arguments: Any, **more: Any) -> BatchForm:
        started = time.perf_counter()
        try:
            return batch_form(*arguments, **more)
        finally:
            seconds.append(time.perf_counter() - started)

    with patch.object(loop, "batch_form", timed), patch.object(team, "batch_form", timed):
        yield seconds


def together(base: Base, plan: ManyPlan) -> dict[str, dict[str, Tensor]]:
    """As `antefix train-many` trains; nothing is written."""
    kept: dict[str, dict[str, Tensor]] = {}

    def keep(user: User, prefix: Prefix) -> None:
        kept[user.name] = prefix.tensors

    def fail(user: User, reason: str) -> None:
        raise RuntimeError(f"{user.name}: {reason}")

    work = work_of(plan, plan.waiting, base, fail)
    train_many(base, replace(work, keep=keep, checkpoints=None))
    return kept


def one_after_another(base: Base, plan: ManyPlan) -> dict[str, dict[str, Tensor]]:
    """As `antefix train` trains, but for the base, which is loaded once."""

    def fail(user: User, reason: str) -> None:
        raise RuntimeError(f"{user.name}: {reason}")

    prepare = work_of(plan, plan.waiting, base, fail).prepare
    return {user.name: run(prepare(user)).tensors for user in plan.waiting}


def spread(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The ratios of some rounds."""
    ratios = [one["ratio"] for one in rounds]
    return {
        "median": round(statistics.median(ratios), 3), "lowest": round(min(ratios), 3),
        "highest": round(max(ratios), 3), "rounds": len(ratios),
        "median_with_asking": round(statistics.median(one["ratio_with_asking"] for one in rounds), 3),
        "largest_relative_difference": max(one["largest_relative_difference"] for one in rounds),
    }  # fmt: skip


if __name__ == "__main__":
    main()
