"""Several recipes times several seeds on one test set, each run resumable: which method does best, and for how much.

A run is a folder: its prefix, and what the prefix answers for the test set. What is there is not done again. Recipes
must train on the same pairs, and on as many of them, or be told that they need not.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from antefix import atomic
from antefix.attach import attached
from antefix.base import Base
from antefix.data import read
from antefix.data.example import Example
from antefix.digest import digest
from antefix.errors import TrainingError
from antefix.generated_file import GeneratedFile
from antefix.methods import method_class
from antefix.metrics import check_java, evaluate, load
from antefix.metrics.bootstrap import Comparison
from antefix.metrics.bootstrap import compare as compare_systems
from antefix.prefix import Prefix
from antefix.tasks import TASKS
from antefix.training.black_box import planned_generations
from antefix.training.identity import recipe_digest
from antefix.training.prepared import Prepared, prepare_recipe, recipe_base, recipe_examples
from antefix.training.recipe import Recipe
from antefix.training.run import answer_each, data_hash, run
from antefix.training.schedule import evaluation_steps

TEXTS_FILE, PREFIX_FOLDER, RUN_FOLDER, WORK_FILE = "texts.jsonl", "prefix", "run", "work.txt"
_PROBED_STEPS, _PROBED_SOURCES = 2, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonPlan:
    """What is compared."""

    recipes: tuple[Recipe, ...]
    seeds: tuple[int, ...]
    test: Sequence[Example]
    metrics: tuple[str, ...]
    """The first one ranks the recipes."""
    folder: Path
    data: Mapping[str, str]
    """By recipe, a digest of what is trained on and of the test set."""

    @property
    def runs(self) -> list[Run]:
        """All runs, seed by seed, so that every recipe has some soon."""
        return [
            Run(recipe, seed, self.folder / f"{recipe.name}-{seed}", self.data[recipe.name])
            for seed in self.seeds
            for recipe in self.recipes
        ]


@dataclass(frozen=True, slots=True)
class Run:
    """A recipe under a seed."""

    recipe: Recipe
    seed: int
    folder: Path
    data: str

    @property
    def work(self) -> str:
        """Tells this run from that of another recipe, other data or another test set."""
        return digest(recipe_digest(self.with_seed), self.data)

    @property
    def is_done(self) -> bool:
        """Whether its texts are written."""
        return (self.folder / TEXTS_FILE).exists()

    @property
    def with_seed(self) -> Recipe:
        """The recipe as it is trained."""
        training = self.recipe.training.model_copy(update={"seed": self.seed})
        return self.recipe.model_copy(update={"training": training})


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A recipe in the table."""

    name: str
    method: str
    trained: int
    """Values that are trained, and that are kept."""
    kept: int
    scores: dict[str, list[float]]
    """By metric, seed by seed."""
    seconds: float
    """Of training, the mean."""
    against_best: dict[str, Comparison]
    """Seed by seed, by the first metric; empty for the best itself."""

    def mean(self, metric: str) -> float:
        return statistics.mean(self.scores[metric])

    def spread(self, metric: str) -> float:
        """The standard deviation over seeds; 0 for one."""
        values = self.scores[metric]
        return statistics.stdev(values) if len(values) > 1 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        against = {
            seed: {"difference": c.difference, "low": c.low, "high": c.high, "p_value": c.p_value}
            for seed, c in self.against_best.items()
        }
        return {"name": self.name, "method": self.method, "trained": self.trained, "kept": self.kept,
                "scores": self.scores, "seconds": round(self.seconds, 1), "minus_the_best": against}  # fmt: skip


def plan_of(
    recipes: Sequence[Recipe], seeds: Sequence[int], test: str, metrics: Sequence[str] | None, folder: Path,
    *, unequal: bool = False,
) -> ComparisonPlan:  # fmt: skip
    """What is compared, checked.

    unequal: that recipes may see other pairs, or more of them. Raises TrainingError for recipes that do not learn the
    same, or not for as long, and for a folder with runs of other ones; MetricError for metrics that cannot be had.
    """
    if len({r.name for r in recipes}) < len(recipes):
        raise TrainingError("two of the recipes have the same name: give each a name of its own")
    if len(tasks := {r.task for r in recipes}) > 1:
        raise TrainingError(f"the recipes are for unlike tasks ({', '.join(sorted(tasks))}): they cannot be compared")
    if not unequal:
        _refuse_unequal(recipes)
    first = recipes[0]
    examples: Sequence[Example] = [e for e in read(test, format=first.data.format, **first.data.reader) if e.targets]
    if not examples:
        raise TrainingError(f"{test}: no example has a target to compare with")
    read_by = {r.name: recipe_examples(r) for r in recipes}
    task = TASKS[first.task]
    examples = task.scored_in_test(examples, [e for part in read_by[first.name] for e in part], seed=0)
    chosen = tuple(metrics or task.metrics[:1])
    check_java([name for name in chosen if load(name).NEEDS_JAVA])  # told before hours of training
    plan = ComparisonPlan(
        recipes=tuple(recipes), seeds=tuple(seeds), test=examples, metrics=chosen, folder=folder,
        data={r.name: digest(*map(data_hash, (*read_by[r.name], examples))) for r in recipes},
    )  # fmt: skip
    for one in plan.runs:
        _check_work(one)
    return plan


def _check_work(one: Run) -> None:
    file = one.folder / WORK_FILE
    if one.folder.exists() and (not file.exists() or file.read_text(encoding="utf-8").strip() != one.work):
        raise TrainingError(
            f"{one.folder} holds a run of another recipe, other data or another test set: give another --out, or "
            "remove it"
        )


def _refuse_unequal(recipes: Sequence[Recipe]) -> None:
    """Raises TrainingError, naming the first two that differ, and in what."""
    first = recipes[0]
    mine = _learned_from(first)
    for other in recipes[1:]:
        which = [key for key, value in _learned_from(other).items() if value != mine[key]]
        budgets = [f"{number:g} {what}" for what, number in map(_budget, (first, other))]
        what = f"data ({', '.join(which)})" if which else f"budget ({' and '.join(budgets)})"
        if which or budgets[0] != budgets[1]:
            raise TrainingError(
                f"'{first.name}' and '{other.name}' differ in their {what}: make them equal, or say --unequal"
            )


def _learned_from(recipe: Recipe) -> dict[str, Any]:
    found = {f"data.{key}": value for key, value in recipe.data.model_dump(exclude={"text"}).items()}
    if TASKS[recipe.task].draws_negatives:  # an epoch has as many false ones as this says
        found["training.negatives"] = recipe.training.negatives
    return found


def _budget(recipe: Recipe) -> tuple[str, float]:
    training = recipe.training
    if method_class(recipe.method).is_searched:
        return "candidates", training.black_box.candidates
    if training.max_steps is None:
        return "epochs", training.epochs
    return "pairs", training.max_steps * training.pairs_per_step


def expected_seconds(plan: ComparisonPlan, base_of: Callable[[Recipe], Base]) -> float:
    """What all runs that are left take, from a few steps, an evaluation and some texts of each recipe."""
    total = 0.0
    for recipe in plan.recipes:
        left = sum(not r.is_done for r in plan.runs if r.recipe is recipe)
        if left == 0:
            continue
        base = base_of(recipe)
        prepared = prepare_recipe(recipe, base=base)
        started = time.perf_counter()
        with attached(base.model, prepared.module):
            some = list(islice(answer_each(prepared, plan.test[:_PROBED_SOURCES]), _PROBED_SOURCES))
        answering = (time.perf_counter() - started) / len(some) * len(plan.test)
        total += left * (_training_seconds(prepared) + answering)
    return total


def _training_seconds(prepared: Prepared) -> float:
    """Of one run: every step takes what a few take, every evaluation what one takes."""
    # Trackers would take a probe for a run.
    training, module = prepared.training.model_copy(update={"trackers": ()}), prepared.module
    if module.is_searched:
        num_steps, probed = planned_generations(module, training), len(module.searched())
        candidates = training.black_box.population * probed
        short = training.model_copy(
            update={"black_box": training.black_box.model_copy(update={"candidates": candidates})}
        )
    else:
        num_steps, probed = prepared.num_steps, _PROBED_STEPS
        short = training.model_copy(update={"max_steps": probed})
    of_steps, with_evaluation = (_seconds_of(replace(prepared, training=one)) for one in (
        short.model_copy(update={"evaluations": 0}), short.model_copy(update={"evaluations": 1})
    ))  # fmt: skip
    evaluations = len(evaluation_steps(num_steps, training.evaluations))
    return of_steps / probed * num_steps + max(0.0, with_evaluation - of_steps) * evaluations


def _seconds_of(prepared: Prepared) -> float:
    started = time.perf_counter()
    run(prepared)
    return time.perf_counter() - started


def finish(
    one: Run, plan: ComparisonPlan, base: Base, watch: Callable[[Any], None], stop_requested: Callable[[], bool]
) -> None:
    """Train a run and write its texts, from where it stopped."""
    kept = one.folder / PREFIX_FOLDER
    if not one.folder.exists():
        with atomic.new_folder(one.folder) as scratch:
            (scratch / WORK_FILE).write_text(f"{one.work}\n", encoding="utf-8")
    prepared = prepare_recipe(one.with_seed, base=base)
    if not kept.exists():
        run(prepared, one.folder / RUN_FOLDER, watch, stop_requested=stop_requested).save(kept)
    prefix = Prefix.load(kept)
    decides = [base.fingerprint, prefix.card.model_dump_json(), repr([e.asked for e in plan.test])]
    file = GeneratedFile(one.folder / TEXTS_FILE, decides)
    left = [n for n in range(len(plan.test)) if n not in file.texts]
    with attached(base.model, prefix):
        for index, text in answer_each(prepared, [plan.test[n] for n in left]) if left else ():
            file.add(left[index], text)
            if stop_requested():
                raise KeyboardInterrupt
    file.finish([e.where for e in plan.test])


def table(plan: ComparisonPlan) -> list[Row]:
    """Every recipe whose runs are all done, the best by the first metric first."""
    references = [e.targets for e in plan.test]
    scored: dict[str, list[dict[str, Any]]] = {}
    rows: list[Row] = []
    for recipe in plan.recipes:
        runs = [r for r in plan.runs if r.recipe is recipe]
        if not all(r.is_done for r in runs):
            continue
        prefixes = [Prefix.load(r.folder / PREFIX_FOLDER) for r in runs]
        scored[recipe.name] = [evaluate(references, _texts(r.folder / TEXTS_FILE), plan.metrics) for r in runs]
        seconds = [float(p.card.training["seconds"]) for p in prefixes]
        rows.append(
            Row(
                name=recipe.name, method=recipe.method, trained=int(prefixes[0].card.training["trained"]),
                kept=prefixes[0].num_values, seconds=statistics.mean(seconds), against_best={},
                scores={m: [one[m].score for one in scored[recipe.name]] for m in plan.metrics},
            )
        )  # fmt: skip
    rows.sort(key=lambda row: row.mean(plan.metrics[0]), reverse=load(plan.metrics[0]).HIGHER_IS_BETTER)
    if not rows:
        return rows
    best = scored[rows[0].name]
    return [rows[0], *(replace(row, against_best=_against(scored[row.name], best, plan)) for row in rows[1:])]


def _against(mine: Sequence[Any], best: Sequence[Any], plan: ComparisonPlan) -> dict[str, Comparison]:
    metric = plan.metrics[0]
    return {
        str(seed): compare_systems({metric: one[metric]}, {metric: other[metric]})[metric]
        for seed, one, other in zip(plan.seeds, mine, best, strict=True)
    }


def _texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def write_table(rows: Sequence[Row], plan: ComparisonPlan) -> None:
    """`results.json` and `comparison.png` in the plan's folder."""
    content = {"metrics": plan.metrics, "seeds": plan.seeds, "test_examples": len(plan.test),
               "rows": [row.to_dict() for row in rows]}  # fmt: skip
    atomic.write_bytes(plan.folder / "results.json", f"{json.dumps(content, indent=1)}\n".encode())
    _plot(rows, plan)


def _plot(rows: Sequence[Row], plan: ComparisonPlan) -> None:
    from matplotlib.figure import Figure

    metric = plan.metrics[0]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for row in rows:
        axes.errorbar(row.kept, row.mean(metric), yerr=row.spread(metric), marker="o", capsize=3)
        axes.annotate(row.name, (row.kept, row.mean(metric)), textcoords="offset points", xytext=(6, 5))
    axes.set_xscale("log")
    axes.set_xlabel("stored values")
    axes.set_ylabel(f"{metric.replace('_', ' ')} on {len(plan.test):,} test sources")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(plan.folder / "comparison.png", dpi=130)


def base_loader() -> Callable[[Recipe], Base]:
    """Loads a recipe's base, once for recipes that name the same."""
    loaded: dict[tuple[str, str | None, str], Base] = {}

    def base_of(recipe: Recipe) -> Base:
        key = recipe.base, recipe.base_revision, recipe.dtype
        if key not in loaded:
            loaded.clear()  # one at a time: they are large
            loaded[key] = recipe_base(recipe)
        return loaded[key]

    return base_of
