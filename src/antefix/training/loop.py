"""One training loop for every method that has gradients; what of a prefix changes in it is its `Learner`.

The base is in eval mode and frozen, whatever is learned stands beside it. An optimiser step takes the number
of source/target pairs it was asked for, in as many forward passes as the token budget makes. Several
processes (Accelerate) share the forward passes of a step; their gradients, a few hundred kilobytes, are summed. They
take every decision alike, and the main one alone writes and is watched.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from transformers import PreTrainedModel

from antefix.attach import attached
from antefix.batches.form import BatchForm, batch_form
from antefix.data.encode import Encoded
from antefix.data.plan import Unit, all_units
from antefix.errors import TrainingError, one_line
from antefix.methods.base import MethodModule
from antefix.processes import (
    failing_together,
    gathered,
    is_main,
    on_processor,
    shared,
    sum_gradients,
    take_from_main,
)
from antefix.training.checkpoint import CHECKPOINT_FILE
from antefix.training.feed import Feed, feed_of
from antefix.training.learner import Learner, Outcome
from antefix.training.objectives import StepSize
from antefix.training.recipe import TrainingRecipe
from antefix.training.recompute import recomputing
from antefix.training.schedule import planned_steps


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a watcher sees after every optimiser step. Watching changes nothing."""

    step: int
    num_steps: int
    loss: float
    """Of this step, as the recipe's reduction says."""
    learning_rate: float
    batch_form: BatchForm
    pairs_per_second: float
    """Since the run was started or resumed, evaluations left out."""
    seconds_left: float
    dev_scores: dict[str, float] | None
    """Fresh ones, where this step measured them."""
    is_best: bool


def train_loop(
    model: PreTrainedModel,
    module: MethodModule,
    train_set: Encoded,
    dev_set: Encoded | None,
    recipe: TrainingRecipe,
    *,
    learning_rate: float,
    digest: str,
    run_folder: Path | None,
    dev_metric: Callable[[], dict[str, float]] | None = None,
    watch: Callable[[StepReport], None] = lambda report: None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train `module` on the base; goes on from the checkpoint in `run_folder`, if there is one.

    digest: tells this run from others; a checkpoint of another run is refused. dev_metric: further dev scores,
    measured by generating, with the module attached. watch: of several processes only the main one is watched.
    stop_requested: asked after every step; True, in any process, saves a checkpoint and raises KeyboardInterrupt.
    Raises TrainingError for a loss that is not finite.
    """
    accelerator = _accelerator(recipe, run_folder)
    model.to(accelerator.device)
    module.to(accelerator.device).train()
    take_from_main(module)
    learner = Learner(
        module,
        recipe,
        learning_rate=learning_rate,
        num_steps=planned_steps(train_set, recipe),
        digest=digest,
        checkpoint=None if run_folder is None else run_folder / CHECKPOINT_FILE,
        has_dev_scores=dev_set is not None or dev_metric is not None,
    )
    # Before a checkpoint is loaded and without dropout: a resumed run must come to the same answer.
    with failing_together(), attached(model, module.eval()):
        form = batch_form(model, train_set, recipe.packed, labels=module.head is not None)
    module.train()
    with failing_together():
        learner.go_on()
    _check_agreement((digest, form, learner.progress.step))

    recompute = recomputing(model) if recipe.activation_checkpointing else nullcontext()
    with attached(model, module) as attachment, recompute:
        with failing_together():
            feed, dev_feed = (
                None if data is None else feed_of(model, module, attachment, data, form, recipe)
                for data in (train_set, dev_set)
            )
        assert feed is not None
        clock = _Clock(learner, form)
        for units in learner.plan(train_set):
            if learner.progress.stopped_early:
                break
            loss = _gradients(learner, feed, units, accelerator)
            rate = learner.step()
            scores, is_best = None, False
            if learner.is_due:
                with clock.evaluating():
                    scores = evaluate(module, dev_feed, dev_metric)
                is_best = learner.note(scores)
            report = clock.report(loss, rate, scores, is_best)
            if recipe.trackers:
                accelerator.log({"loss": loss, "learning_rate": rate} | (scores or {}), step=report.step)
            stop, is_over = any(gathered(stop_requested())), learner.num_steps_left == 0
            # Told before it is saved: of a step told and not saved the log drops the line when it is done again, but of
            # one saved and not told the line would be missing for ever.
            with failing_together():
                if is_main():
                    watch(report)
                    learner.save(at_once=stop or is_over)
            if stop and not is_over:
                raise KeyboardInterrupt
    for tracker in accelerator.trackers:  # not `end_training`: it ends the processes' bond as well
        tracker.finish()
    outcome = learner.outcome(form)
    module.eval()
    return outcome


def _accelerator(recipe: TrainingRecipe, run_folder: Path | None) -> Accelerator:
    with failing_together():
        _check_trackers(recipe.trackers)
    accelerator = Accelerator(
        cpu=on_processor(),
        log_with=list(recipe.trackers) or None,
        project_dir=None if run_folder is None else str(run_folder),
    )
    if recipe.trackers:
        try:
            accelerator.init_trackers("antefix", config=recipe.model_dump(mode="json", exclude={"trackers"}))
        except ValueError as error:  # one that writes files has no folder for them
            raise TrainingError(f"training.trackers: {one_line(error)}; give a run_folder") from error
    return accelerator


def _gradients(learner: Learner, feed: Feed, units: Sequence[Unit], accelerator: Accelerator) -> float:
    """Those of the next step, summed over processes; returns its loss. Raises TrainingError where it is no number."""
    module, recipe, step = learner.module, learner.recipe, learner.progress.step
    size = StepSize.of(feed.data, units)
    loss = torch.zeros((), device=accelerator.device)
    for number, part in shared(list(enumerate(feed.parts(units, multiple_of=accelerator.num_processes)))):
        batch = feed.batch(part)  # before the seed: it may read sources
        # Every draw is a function of the seed, the step and the pass in it: a resumed run draws the same, and
        # processes draw what one would.
        torch.manual_seed(recipe.seed * 1_000_003 + step + number * 15_485_863)
        part_loss = feed.step_loss(batch, size, recipe)
        if (auxiliary := module.auxiliary_loss(batch.condition)) is not None:
            part_loss = part_loss + auxiliary * len(part) / len(units)
        part_loss.backward()  # type: ignore[no-untyped-call]
        loss += part_loss.detach()
    whole = float(sum_gradients(learner.parameters, loss))
    if (problem := learner.check_gradients(whole)) is not None:
        with failing_together():  # a step's loss is the same in all processes
            raise problem
    return whole


class _Clock:
    """What a run has taken, and will take."""

    def __init__(self, learner: Learner, form: BatchForm) -> None:
        self._learner, self._form = learner, form
        self._started, self._evaluating = time.perf_counter(), 0.0
        self._seconds_before, self._steps_before = learner.progress.seconds, learner.progress.step

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """What is done inside is no training."""
        started = time.perf_counter()
        yield
        self._evaluating += time.perf_counter() - started

    def report(self, loss: float, rate: float, scores: dict[str, float] | None, is_best: bool) -> StepReport:
        """Of the step that is done; its time is noted."""
        progress, num_steps = self._learner.progress, self._learner.num_steps
        passed, done = time.perf_counter() - self._started, progress.step - self._steps_before
        progress.seconds = self._seconds_before + passed
        return StepReport(
            step=progress.step,
            num_steps=num_steps,
            loss=loss,
            learning_rate=rate,
            batch_form=self._form,
            pairs_per_second=done * self._learner.recipe.pairs_per_step / max(passed - self._evaluating, 1e-9),
            seconds_left=passed / done * (num_steps - progress.step),
            dev_scores=scores,
            is_best=is_best,
        )


def _check_trackers(names: Sequence[str]) -> None:
    """Accelerate leaves a tracker that is not installed out with a warning, and all of the run's figures with it."""
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name not in available:
            known = ", ".join(available) or "none is"
            raise TrainingError(f"training.trackers: '{name}' is not installed here, or unknown; installed: {known}")


def _check_agreement(run: tuple[str, str, int]) -> None:
    """Processes at unlike steps would wait for each other for ever."""
    if len(set(gathered(run))) > 1:
        with failing_together():
            raise TrainingError(
                "the processes see other data, another base or another checkpoint each: give them the same files, "
                "and one run folder that all of them see"
            )


@torch.no_grad()
def dev_loss(feed: Feed) -> float:
    """Mean negative log-likelihood of a target token, a label or a right choice; processes share it."""
    total = 0.0
    for part in shared(feed.parts(all_units(feed.data))):
        total += float(feed.row_losses(feed.batch(part)).double().sum())
    return sum(gathered(total)) / feed.loss_count


def evaluate(
    module: MethodModule, dev_feed: Feed | None, dev_metric: Callable[[], dict[str, float]] | None
) -> dict[str, float]:
    """Fresh dev scores, with the module attached."""
    module.eval()
    scores = {}
    if dev_feed is not None:
        scores["dev_loss"] = dev_loss(dev_feed)
    if dev_metric is not None:
        scores |= dev_metric()
    module.train()
    return scores
