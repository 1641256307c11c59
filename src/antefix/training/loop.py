"""One training loop for every method that has gradients, top to bottom in one function.

The base is in eval mode and frozen, whatever is learned stands beside it. An optimiser step takes the number
of source/target pairs it was asked for, in as many forward passes as the token budget makes. Several
processes (Accelerate) share the forward passes of a step; their gradients, a few hundred kilobytes, are summed. They
take every decision alike, and the main one alone writes and is watched.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.optimization import Adafactor

from antefix.attach import attached
from antefix.batches.form import BatchForm, batch_form
from antefix.data.encode import Encoded
from antefix.data.plan import all_units, steps
from antefix.errors import TrainingError
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
from antefix.training.checkpoint import CHECKPOINT_FILE, Progress, load_checkpoint, save_checkpoint
from antefix.training.feed import Feed, feed_of
from antefix.training.objectives import StepSize
from antefix.training.recipe import TrainingRecipe
from antefix.training.recompute import recomputing


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


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished run."""

    progress: Progress
    tensors: dict[str, Tensor]
    """The kept tensors of the best step."""
    form: BatchForm


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
    with failing_together():
        _check_trackers(recipe.trackers)
    accelerator = Accelerator(
        cpu=on_processor(),
        log_with=list(recipe.trackers) or None,
        project_dir=None if run_folder is None else str(run_folder),
    )
    if recipe.trackers:
        accelerator.init_trackers("antefix", config=recipe.model_dump(mode="json", exclude={"trackers"}))
    model.to(accelerator.device)
    module.to(accelerator.device).train()
    take_from_main(module)
    groups = [{"params": params, "scale": scale} for params, scale in module.rate_scales()]
    parameters = [p for params, _ in module.rate_scales() for p in params]
    optimiser = optimiser_of(groups, learning_rate, recipe)
    num_steps = planned_steps(train_set, recipe)
    progress, best = Progress(), module.kept()
    # Before a checkpoint is loaded and without dropout: a resumed run must come to the same answer.
    with failing_together(), attached(model, module.eval()):
        form = batch_form(model, train_set, recipe.packed, labels=module.head is not None)
    module.train()
    checkpoint = None if run_folder is None else run_folder / CHECKPOINT_FILE
    with failing_together():
        if checkpoint is not None and checkpoint.exists():
            progress, best = load_checkpoint(checkpoint, digest, module, optimiser)
    _check_agreement((digest, form, progress.step))
    evaluate_at = evaluation_steps(num_steps, recipe.evaluations if dev_set or dev_metric else 0)

    recompute = recomputing(model) if recipe.activation_checkpointing else nullcontext()
    with attached(model, module) as attachment, recompute:
        with failing_together():
            feed, dev_feed = (
                None if data is None else feed_of(model, module, attachment, data, form, recipe)
                for data in (train_set, dev_set)
            )
        assert feed is not None
        plan = steps(
            train_set, pairs_per_step=recipe.pairs_per_step, targets_per_row=recipe.targets_per_row, seed=recipe.seed
        )
        started, seconds_before, steps_before = time.perf_counter(), progress.seconds, progress.step
        last_saved, evaluating = started, 0.0
        for units in itertools.islice(plan, progress.step, num_steps):
            if progress.stopped_early:
                break
            rate = set_rate(optimiser, learning_rate, progress.step, num_steps, recipe)
            size = StepSize.of(train_set, units)
            batches = feed.parts(units, multiple_of=accelerator.num_processes)
            loss = torch.zeros((), device=accelerator.device)
            for number, part in shared(list(enumerate(batches))):
                batch = feed.batch(part)  # before the seed: it may read sources
                # Every draw is a function of the seed, the step and the pass in it: a resumed run draws the same, and
                # processes draw what one would.
                torch.manual_seed(recipe.seed * 1_000_003 + progress.step + number * 15_485_863)
                part_loss = feed.step_loss(batch, size, recipe)
                if (auxiliary := module.auxiliary_loss(batch.condition)) is not None:
                    part_loss = part_loss + auxiliary * len(part) / len(units)
                part_loss.backward()  # type: ignore[no-untyped-call]
                loss += part_loss.detach()
            loss = sum_gradients(parameters, loss)
            _check_loss(float(loss), progress.step + 1, learning_rate)
            torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            progress.step += 1

            scores, is_best = None, False
            if progress.step in evaluate_at:
                evaluation_started = time.perf_counter()
                scores = evaluate(module, dev_feed, dev_metric)
                is_best = note_scores(progress, scores, recipe)
                if is_best:
                    best = module.kept()
                evaluating += time.perf_counter() - evaluation_started
            now = time.perf_counter()
            progress.seconds = seconds_before + now - started
            done = progress.step - steps_before
            trained = max(now - started - evaluating, 1e-9)
            report = StepReport(
                step=progress.step,
                num_steps=num_steps,
                loss=float(loss),
                learning_rate=rate,
                batch_form=form,
                pairs_per_second=done * recipe.pairs_per_step / trained,
                seconds_left=(now - started) / done * (num_steps - progress.step),
                dev_scores=scores,
                is_best=is_best,
            )
            if recipe.trackers:
                accelerator.log({"loss": report.loss, "learning_rate": rate} | (scores or {}), step=progress.step)
            stop, is_over = any(gathered(stop_requested())), progress.step == num_steps or progress.stopped_early
            # Told before it is saved: of a step told and not saved the log drops the line when it is done again, but of
            # one saved and not told the line would be missing for ever.
            with failing_together():
                if is_main():
                    watch(report)
                due = now - last_saved >= recipe.checkpoint_seconds or is_over or stop
                if checkpoint is not None and due and is_main():
                    save_checkpoint(checkpoint, digest, progress, module, optimiser, best)
                    last_saved = now
            if stop and not is_over:
                raise KeyboardInterrupt
    for tracker in accelerator.trackers:  # not `end_training`: it ends the processes' bond as well
        tracker.finish()
    if not evaluate_at:
        progress.best_step, best = progress.step, module.kept()
    module.eval()
    return Outcome(progress, best, form)


def optimiser_of(groups: list[dict[str, Any]], learning_rate: float, recipe: TrainingRecipe) -> torch.optim.Optimizer:
    """groups: each with its `scale`, what `set_rate` multiplies the run's rate by."""
    if recipe.optimiser == "adafactor":
        return Adafactor(  # type: ignore[no-untyped-call]
            groups, lr=learning_rate, weight_decay=recipe.weight_decay, scale_parameter=True, relative_step=False
        )
    return torch.optim.AdamW(groups, lr=learning_rate, weight_decay=recipe.weight_decay)


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


def _check_loss(loss: float, step: int, learning_rate: float) -> None:
    if not math.isfinite(loss):
        with failing_together():  # a step's loss is the same in all processes
            raise TrainingError(f"step {step}: the loss is {loss}; lower learning_rate (now {learning_rate:g})")


def planned_steps(train_set: Encoded, recipe: TrainingRecipe) -> int:
    """How many optimiser steps the run takes."""
    return planned_steps_of(train_set.num_pairs / train_set.num_draws, recipe)


def planned_steps_of(pairs_of_epoch: float, recipe: TrainingRecipe) -> int:
    """How many optimiser steps a run takes whose epochs have so many pairs."""
    if recipe.max_steps is not None:
        return recipe.max_steps
    return max(1, math.ceil(recipe.epochs * pairs_of_epoch / recipe.pairs_per_step))


@torch.no_grad()
def dev_loss(feed: Feed) -> float:
    """Mean negative log-likelihood of a target token, a label or a right choice; processes share it."""
    total = 0.0
    for part in shared(feed.parts(all_units(feed.data))):
        total += float(feed.row_losses(feed.batch(part)).double().sum())
    return sum(gathered(total)) / feed.dev_count


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


def note_scores(progress: Progress, scores: dict[str, float], recipe: TrainingRecipe) -> bool:
    """Keeps the books; True if this is the best step so far."""
    progress.dev_scores.append({"step": progress.step, **scores})
    score = scores[f"dev_{recipe.dev_metric}"]
    if recipe.dev_metric == "loss":
        score = -score
    if progress.best_score is None or score > progress.best_score:
        progress.best_score, progress.best_step, progress.evaluations_without_gain = score, progress.step, 0
        return True
    progress.evaluations_without_gain += 1
    progress.stopped_early = recipe.patience is not None and progress.evaluations_without_gain >= recipe.patience
    return False


def evaluation_steps(num_steps: int, evaluations: int) -> set[int]:
    """After which steps dev scores are measured, the last one among them."""
    return {math.ceil(num_steps * (n + 1) / evaluations) for n in range(evaluations)}


def set_rate(optimiser: torch.optim.Optimizer, peak: float, step: int, num_steps: int, recipe: TrainingRecipe) -> float:
    """The learning rate of this step, set and returned."""
    warmup = math.ceil(0.05 * num_steps) if recipe.warmup_steps is None else recipe.warmup_steps
    if step < warmup:
        rate = peak * (step + 1) / warmup
    elif recipe.schedule == "linear":
        rate = peak * (num_steps - step) / max(num_steps - warmup, 1)
    else:
        rate = peak
    for group in optimiser.param_groups:
        group["lr"] = rate * group["scale"]
    return rate
