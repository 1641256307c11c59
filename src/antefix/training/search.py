"""A search: the same run with other values in its recipe, again and again, for the best dev score.

A trial trains as `antefix train` would and keeps no prefix: the recipe with the best values (`best.toml`) does, and
comes to the same score. Base and data are loaded once, and again only for a trial that changes them. Knows nothing of
how values are drawn (`trials`), nor of what a search leaves to look at (`search_files`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from antefix.base import Base
from antefix.data.example import Example
from antefix.digest import digest
from antefix.errors import AntefixError, TrainingError
from antefix.methods import method_class
from antefix.processes import check_alone
from antefix.training.loop import StepReport
from antefix.training.prepared import Prepared, prepare_recipe, recipe_base, recipe_examples
from antefix.training.recipe import Recipe, with_values
from antefix.training.run import run
from antefix.training.search_files import Found, write_found
from antefix.training.space import Range, Value
from antefix.training.trials import JOURNAL_FILE, SearchPlan, Trial, Trials, open_trials, require_optuna

SEARCH_FOLDER = "search"
"""In the run's folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchReport:
    """What a watcher sees after every optimiser step, and at a trial's end. Watching changes nothing."""

    trial: int
    """Counted from 1."""
    num_trials: int
    step: StepReport | None
    """None at the trial's end."""
    ended: Trial | None
    """Only at the trial's end."""
    best: Trial | None
    """Of the ended ones."""
    seconds_left: float


def search_folder(recipe: Recipe) -> Path:
    """Where a recipe's search keeps its trials and results."""
    return recipe.run_folder / SEARCH_FOLDER


def search(
    recipe: Recipe,
    *,
    trials: int | None = None,
    anew: bool = False,
    watch: Callable[[SearchReport], None] = lambda report: None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Found:
    """Try what the recipe's `search` says, go on from the trials that are kept, and write what was found.

    trials: goes before the recipe's number. anew: drop the kept trials. stop_requested: ends the search after the
    step it is in, by KeyboardInterrupt. Raises RecipeError for values the recipe does not take, TrainingError where
    there is no score, and all that a run raises before its first step.
    """
    require_optuna()
    check_alone("a search")
    # Trackers would take the trials for one run.
    plain = recipe.model_copy(update={"training": recipe.training.model_copy(update={"trackers": ()})})
    loaded = _Loaded()
    prepared = loaded.prepare(plain)
    _check_scored(prepared)
    plan = _plan(recipe, prepared)
    num_trials = trials or recipe.search.trials
    folder = search_folder(recipe)
    with open_trials(folder / JOURNAL_FILE, plan, anew=anew) as kept:
        while len(kept.ended) < num_trials:
            if stop_requested():
                raise KeyboardInterrupt
            _Attempt(plain, loaded, kept, num_trials, watch, stop_requested)()
        found = Found(metric=_metric(prepared), space=plan.space, seed=plan.seed, trials=kept.ranked, best=kept.best)
        write_found(found, recipe, folder)
    if kept.best is None:
        first = kept.ended[0]
        raise TrainingError(f"none of {len(kept.ended)} trials has a score; trial 1 of {_said(first)}: {first.why}")
    return found


def default_space(prepared: Prepared) -> dict[str, Range]:
    """What is searched where a recipe does not say: the learning rate, a factor of ten around the method's own."""
    usual = method_class(prepared.method).default_learning_rate(prepared.config)
    return {"training.learning_rate": Range(low=usual / 10, high=usual * 10, log=True)}


class _Loaded:
    """The last base and the last data, for trials that change neither."""

    def __init__(self) -> None:
        self._base: tuple[Any, Base] | None = None
        self._examples: tuple[Any, tuple[Sequence[Example], Sequence[Example]]] | None = None

    def prepare(self, recipe: Recipe) -> Prepared:
        of_data = recipe.data.model_dump_json(exclude={"text", "max_source_tokens", "max_target_tokens"})
        if self._examples is None or self._examples[0] != of_data:
            self._examples = (of_data, recipe_examples(recipe))
        of_base = (recipe.base, recipe.dtype, recipe.base_revision)
        if self._base is None or self._base[0] != of_base:
            self._base = None  # not two in memory
            self._base = (of_base, recipe_base(recipe))
        return prepare_recipe(recipe, self._examples[1], self._base[1])


class _PrunedError(Exception):
    """Leaves a training loop."""


@dataclass
class _Attempt:
    """One trial, from its values to what became of it."""

    recipe: Recipe
    loaded: _Loaded
    kept: Trials
    num_trials: int
    watch: Callable[[SearchReport], None]
    stop_requested: Callable[[], bool]

    def __call__(self) -> None:
        self.number = len(self.kept.ended) + 1
        self.started = time.perf_counter()
        self.scores: list[float] = []
        self.unkept: TrainingError | None = None
        values = self.kept.start()
        twin = next((t for t in self.kept.ended if t.values == values and t.state != "pruned"), None)
        if twin is not None:
            result = {"state": twin.state, "score": twin.score, "kept_step": twin.kept_step, "why": twin.why}
            ended = self.kept.end(**result, same_as=twin.same_as or twin.number)
        else:
            result = self._result(values)
            ended = self.kept.end(**result, seconds=round(time.perf_counter() - self.started, 2))
        self._tell(None, ended, (self.num_trials - self.number) * self._mean_seconds(0.0))

    def _result(self, values: Mapping[str, Value]) -> dict[str, Any]:
        try:
            prepared = self.loaded.prepare(with_values(self.recipe, values))
            self.metric = _metric(prepared)
            card = run(prepared, None, self._note, stop_requested=self.stop_requested).card
        except _PrunedError:
            better = min if self.metric == "dev_loss" else max
            return {"state": "pruned", "score": better(self.scores)}
        except torch.OutOfMemoryError:
            return {"state": "failed", "why": "out of memory"}
        except AntefixError as error:  # a loss that is not finite, values that do not fit together
            if error is self.unkept:
                raise
            return {"state": "failed", "why": str(error)}
        kept_step = card.training["kept_step"]
        score = next(row[self.metric] for row in card.scores["dev"] if row["step"] == kept_step)
        if not math.isfinite(score):
            return {"state": "failed", "why": f"step {kept_step}: the {self.metric.replace('_', ' ')} is {score}"}
        return {"state": "done", "score": score, "kept_step": kept_step}

    def _note(self, report: StepReport) -> None:
        rest = (self.num_trials - self.number) * self._mean_seconds(
            time.perf_counter() - self.started + report.seconds_left
        )
        self._tell(report, None, report.seconds_left + rest)
        if report.dev_scores is not None:
            self.scores.append(report.dev_scores[self.metric])
            try:
                is_hopeless = self.kept.report(len(self.scores), self.scores[-1])
            except TrainingError as error:
                self.unkept = error
                raise
            if is_hopeless and report.step < report.num_steps:
                raise _PrunedError

    def _mean_seconds(self, of_this: float) -> float:
        """Of the trials that were trained; this one's estimate before any was."""
        seconds = [t.seconds for t in self.kept.ended if t.same_as is None]
        return sum(seconds) / len(seconds) if seconds else of_this

    def _tell(self, step: StepReport | None, ended: Trial | None, seconds_left: float) -> None:
        self.watch(
            SearchReport(
                trial=self.number, num_trials=self.num_trials, step=step, ended=ended, best=self.kept.best,
                seconds_left=seconds_left,
            )
        )  # fmt: skip


def _metric(prepared: Prepared) -> str:
    return f"dev_{prepared.training.dev_metric}"


def _check_scored(prepared: Prepared) -> None:
    if prepared.training.evaluations == 0:
        raise TrainingError("training.evaluations is 0, and a search needs dev scores: set it to 1 or more")
    if prepared.dev_set.num_pairs == 0:
        raise TrainingError("the dev set has no pairs, and a search needs dev scores: give another data.dev")


def _plan(recipe: Recipe, prepared: Prepared) -> SearchPlan:
    space = recipe.search.space or default_space(prepared)
    training = prepared.training
    facts = {
        "base": (prepared.base.fingerprint, prepared.base.precision),
        "data": (prepared.text_format, prepared.train_set, prepared.dev_set),
        "space": ({key: values.model_dump() for key, values in space.items()}, recipe.search.seed),
        "settings": (
            prepared.method, prepared.config, prepared.learning_rate, prepared.decoding, recipe.search.prune,
            training.model_dump_json(exclude={"checkpoint_seconds", "trackers"}),
        ),
    }  # fmt: skip
    return SearchPlan(
        space=space,
        maximise=training.dev_metric != "loss",
        seed=recipe.search.seed,
        prune=recipe.search.prune,
        facts={name: digest(repr(fact)) for name, fact in facts.items()},
    )


def _said(trial: Trial) -> str:
    return ", ".join(f"{key} = {value}" for key, value in trial.values.items())
