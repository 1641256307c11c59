"""The loop for methods that are found without gradients: CMA-ES over a few values (Sun et al. 2022, arXiv 2201.03514).

A generation's candidates are prefixes of their own in one batch: each row is a training pair under one of them. A
method with several vectors (one a layer) has as many searches, which take turns; each tries its candidates with the
others at their best so far (arXiv 2205.11200). What is best on the dev set is kept.

A search is a function of its seed and of the losses it was told. These are all that is written down, so that an
interrupted run goes on to the same bits by telling them again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from antefix.attach import attached
from antefix.attention.branch import Branch
from antefix.batches.batch import Batch
from antefix.batches.form import batch_form
from antefix.batches.labelled import hinge_losses
from antefix.data.encode import Encoded
from antefix.data.plan import Unit, all_units
from antefix.errors import TrainingError
from antefix.growing_file import GrowingFile, OtherWorkError
from antefix.methods.base import MethodModule
from antefix.parts.initial import Positions
from antefix.parts.key_value import KeyValue
from antefix.parts.rows import EncoderRows
from antefix.processes import check_alone
from antefix.training.checkpoint import Progress, of_another_run
from antefix.training.feed import Feed, feed_of
from antefix.training.learner import Outcome
from antefix.training.loop import StepReport, evaluate
from antefix.training.recipe import TrainingRecipe
from antefix.training.schedule import evaluation_steps

GENERATIONS_FILE = "generations.jsonl"
MARGIN = 2.0
"""Of the hinge loss, as released."""
_TOKENS_AT_ONCE = 8192
"""Of a forward pass: no gradients, so that nothing is kept of it."""


def search_loop(
    model: PreTrainedModel,
    module: MethodModule,
    train_set: Encoded,
    dev_set: Encoded | None,
    recipe: TrainingRecipe,
    *,
    digest: str,
    run_folder: Path | None,
    dev_metric: Callable[[], dict[str, float]] | None = None,
    watch: Callable[[StepReport], None] = lambda report: None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Search `module`'s vectors; goes on from the generations written in `run_folder`. See `train_loop`.

    A step of the reports is a generation. Raises TrainingError where pycma is not installed, for too few candidates,
    for a hinge loss without labels, and where several processes train as one.
    """
    check_alone("what is found without gradients")
    module.to(model.device).eval()
    points = module.searched()
    num_generations = planned_generations(module, recipe)
    searches = [_search(point, module.step_size, recipe, number) for number, point in enumerate(points)]
    written = _Generations(None if run_folder is None else run_folder / GENERATIONS_FILE, digest)
    evaluate_at = evaluation_steps(num_generations, recipe.evaluations if dev_set or dev_metric else 0)
    progress, best = Progress(seconds=written.seconds), module.kept()
    with torch.no_grad(), attached(model, module) as attachment:
        form = batch_form(model, train_set, recipe.packed, labels=module.head is not None)
        feed, dev_feed = (
            None if data is None else feed_of(model, module, attachment, data, form, recipe)
            for data in (train_set, dev_set)
        )
        assert feed is not None
        if recipe.black_box.loss == "hinge" and feed.label_head is None:
            raise TrainingError("training.black_box.loss = 'hinge' is for labels: leave it out")
        searched_s = 0.0
        for number in range(num_generations):
            started = time.perf_counter()
            turn = number % len(points)
            candidates = searches[turn].ask()
            known = written.at(number)
            losses = known["losses"] if known else _losses(model, module, points[turn], candidates, feed, recipe)
            searches[turn].tell(candidates, losses)
            _put(points[turn], searches[turn].result.xbest)
            progress.step += 1
            scores, is_best = None, False
            if progress.step in evaluate_at:
                scores = known["dev"] if known else evaluate(module, dev_feed, dev_metric)
                module.eval()
                is_best = progress.note(scores, recipe)
                if is_best:
                    best = module.kept()
            if known is None:
                passed = time.perf_counter() - started
                searched_s, progress.seconds = searched_s + passed, progress.seconds + passed
                written.add({"losses": losses, "dev": scores, "seconds": round(passed, 3)})
                seconds = searched_s / (progress.step - written.at_start)
                report = StepReport(
                    step=progress.step, num_steps=num_generations, loss=min(losses),
                    learning_rate=float(searches[turn].sigma), batch_form=form,
                    pairs_per_second=len(losses) * train_set.num_pairs / seconds,
                    seconds_left=seconds * (num_generations - progress.step),
                    dev_scores=scores, is_best=is_best,
                )  # fmt: skip
                watch(report)
                if stop_requested() and progress.step < num_generations:
                    raise KeyboardInterrupt
            if progress.stopped_early:
                break
    if not evaluate_at:
        progress.best_step, best = progress.step, module.kept()
    return Outcome(progress, best, form)


def planned_generations(module: MethodModule, recipe: TrainingRecipe) -> int:
    """How many generations are tried, the same number for every vector.

    Raises TrainingError where the candidates do not make one.
    """
    groups, settings = len(module.searched()), recipe.black_box
    rounds = settings.candidates // (settings.population * groups)
    if rounds == 0:
        raise TrainingError(
            f"training.black_box.candidates = {settings.candidates}: a generation of {settings.population} for each of "
            f"{groups} vectors takes {settings.population * groups}"
        )
    return rounds * groups


def _search(point: nn.Parameter, step_size: float, recipe: TrainingRecipe, number: int) -> Any:
    try:
        import cma
    except ImportError as error:
        raise TrainingError("methods without gradients need pycma: pip install 'antefix[cma]'") from error
    # By default pycma draws from, and seeds, what everybody else draws from.
    draw = np.random.default_rng((recipe.seed % 2**64, number))
    options = {
        "popsize": recipe.black_box.population, "verbose": -9, "seed": math.nan,
        "randn": lambda *shape: draw.standard_normal(shape),
    }  # fmt: skip
    return cma.CMAEvolutionStrategy(point.detach().double().tolist(), step_size, options)


def _put(point: nn.Parameter, values: Any) -> None:
    with torch.no_grad():
        point.copy_(torch.as_tensor(values, dtype=point.dtype))


def _losses(
    model: PreTrainedModel, module: MethodModule, point: nn.Parameter, values: Sequence[Any], feed: Feed,
    recipe: TrainingRecipe,
) -> list[float]:  # fmt: skip
    """The mean loss of every candidate over all training pairs."""
    before, found = point.detach().clone(), []
    at_once = recipe.black_box.at_once or len(values)
    for first in range(0, len(values), at_once):
        candidates = []
        for one in values[first : first + at_once]:
            _put(point, one)
            candidates.append(Candidate(module))
        found += _losses_together(model, candidates, feed, recipe)
    _put(point, before)
    return found


def _losses_together(
    model: PreTrainedModel, candidates: Sequence[Candidate], feed: Feed, recipe: TrainingRecipe
) -> list[float]:
    """Of candidates in one batch, or as few as the tokens allow."""
    data = feed.data
    units = all_units(data) if data.are_choices else all_units(data, targets_per_row=1)
    rows = [(n, unit) for unit in units for n in range(len(candidates))]
    totals = torch.zeros(len(candidates), dtype=torch.float64)
    with attached(model, *candidates) as attachment:
        for part in _within(rows, feed, _TOKENS_AT_ONCE):
            index = [n for n, _ in part]
            attachment.rows = index
            batch = feed.batch([unit for _, unit in part])
            totals.index_add_(0, torch.tensor(index), _pair_losses(batch, feed, recipe).double().cpu())
    return [float(total) / feed.loss_count for total in totals]


def _pair_losses(batch: Batch, feed: Feed, recipe: TrainingRecipe) -> Tensor:
    """Of every row of the batch."""
    if recipe.black_box.loss == "hinge" and feed.label_head is not None:
        return hinge_losses(feed.model, feed.label_head, batch, MARGIN)
    return feed.row_losses(batch)


def _within(rows: Sequence[tuple[int, Unit]], feed: Feed, tokens: int) -> list[list[tuple[int, Unit]]]:
    """Rows of like lengths together, so many that padding included they hold at most these tokens."""

    def length(row: tuple[int, Unit]) -> int:
        example, targets = feed.data.examples[row[1].example], row[1].targets
        num_sources = len(targets) if feed.form == "padded" else 1
        return num_sources * len(example.source) + sum(len(example.targets[t]) for t in targets)

    parts: list[list[tuple[int, Unit]]] = []
    for row in sorted(rows, key=length):
        if parts and (len(parts[-1]) + 1) * length(row) <= tokens:
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts


class Candidate(MethodModule):
    """What a method is at a point of its search, fixed."""

    def __init__(self, module: MethodModule) -> None:
        super().__init__()
        self.head = module.head
        self._positions, self._num_virtual_tokens = module.positions, module.num_virtual_tokens
        self._slots, self._rows, self._branches = module.slots(), module.encoder_rows(), module.branches()

    @property
    def positions(self) -> Positions:
        return self._positions

    @property
    def num_virtual_tokens(self) -> int:
        return self._num_virtual_tokens

    def slots(self) -> dict[str, KeyValue]:
        return dict(self._slots)

    def branches(self) -> dict[str, Sequence[Branch]]:
        return dict(self._branches)

    def encoder_rows(self) -> EncoderRows | None:
        return self._rows


class _Generations:
    """The losses of generations as they are known, in a file that an interrupted run goes on from."""

    def __init__(self, path: Path | None, digest: str) -> None:
        """Raises TrainingError for a file of another run."""
        self._file = None if path is None else GrowingFile(path, digest)
        try:
            self._found: list[dict[str, Any]] = [] if self._file is None else self._file.read()
        except OtherWorkError as error:
            raise of_another_run(error.path.parent) from error
        except (OSError, ValueError, TypeError) as error:
            raise TrainingError(f"{path}: not a file of generations ({error}); remove it to start anew") from error
        self.at_start = len(self._found)

    @property
    def seconds(self) -> float:
        """Of the generations that were written down before this run."""
        return sum(float(one["seconds"]) for one in self._found)

    def at(self, number: int) -> dict[str, Any] | None:
        """A generation that was written down before this run."""
        return self._found[number] if number < self.at_start else None

    def add(self, generation: dict[str, Any]) -> None:
        """Write one down. Raises TrainingError."""
        if self._file is None:
            return
        try:
            self._file.add(generation)
        except OSError as error:
            raise TrainingError(f"{self._file.path}: cannot be written ({error.strerror or error})") from error
