"""One prefix of many on its way: its own optimiser, schedule, steps, best values and early stop.

It knows nothing of the others. What it needs next it says in `needs`; who feeds it tells it what came of that. A step
is what `train_loop` makes of it, so that a prefix becomes the same among others as alone.
"""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from antefix.batches.form import BatchForm
from antefix.data.plan import all_units, steps
from antefix.errors import TrainingError
from antefix.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from antefix.training.loop import (
    Outcome,
    evaluation_steps,
    note_scores,
    optimiser_of,
    set_rate,
)
from antefix.training.mixing import Extent
from antefix.training.objectives import StepSize, reduce_losses
from antefix.training.prepared import Prepared
from antefix.training.users import User

Need = Literal["step", "dev_scores", "base_loss"]


class Learner:
    """A user at work. Reads the checkpoint of an interrupted run, if it is of this training."""

    def __init__(self, user: User, prepared: Prepared, form: BatchForm, checkpoint: Path | None) -> None:
        self.user, self.prepared, self.form = user, prepared, form
        self.module = prepared.module.to(prepared.base.model.device).train()
        self.progress, self.best = Progress(), self.module.kept()
        self.base_loss: float | None = None
        """Dev loss of the bare base."""
        recipe = prepared.training
        self._parameters = [p for params, _ in self.module.rate_scales() for p in params]
        groups = [{"params": params, "scale": scale} for params, scale in self.module.rate_scales()]
        self._optimiser = optimiser_of(groups, prepared.learning_rate, recipe)
        self._num_steps = prepared.num_steps
        self._checkpoint = checkpoint
        self._saved, self._saved_step = time.monotonic(), -1
        if checkpoint is not None and checkpoint.exists():
            self._go_on(checkpoint)
        self._evaluate_at = evaluation_steps(self._num_steps, recipe.evaluations if self.has_dev_set else 0)
        self._plan = itertools.islice(
            steps(
                prepared.train_set,
                pairs_per_step=recipe.pairs_per_step,
                targets_per_row=recipe.targets_per_row,
                seed=recipe.seed,
            ),
            self.progress.step,
            self._num_steps,
        )
        self.dev_units = all_units(prepared.dev_set)
        self.dev_extent = Extent.of(prepared.dev_set, self.dev_units, form)
        self.extent = Extent(0, 0, 0)
        """Of the rows of the next step."""
        self._loss, self._norm = 0.0, torch.zeros(())
        measured = self.progress.dev_scores[-1]["step"] if self.progress.dev_scores else 0
        self._is_due = self.progress.step in self._evaluate_at and measured < self.progress.step
        self._next_step()

    @property
    def has_dev_set(self) -> bool:
        """Whether its best step can be told."""
        return self.prepared.dev_set.num_pairs > 0

    @property
    def num_steps_left(self) -> int:
        """At most: it may stop early."""
        return 0 if self.progress.stopped_early else self._num_steps - self.progress.step

    @property
    def needs(self) -> Need | None:
        """What is to be done next; None: it is over."""
        if self._is_due:
            return "dev_scores"
        if self.num_steps_left:
            return "step"
        # Padding that stands where soft tokens do is nothing that the bare base ever reads.
        if self.has_dev_set and self.base_loss is None and self.module.num_inserted_tokens == 0:
            return "base_loss"
        return None

    @property
    def num_target_tokens_of_dev(self) -> int:
        """Target tokens of the dev set, what its loss is a mean over."""
        return sum(len(target) for e in self.prepared.dev_set.examples for target in e.targets)

    def step_loss(self, losses_M: Tensor) -> Tensor:
        """What these pairs of the step add to its loss."""
        loss = reduce_losses(losses_M, self._size, self.prepared.training.loss_reduction)
        self._loss += float(loss.detach())
        return loss

    def clear(self) -> None:
        """No gradients, and no loss: the step begins, or begins anew."""
        self._optimiser.zero_grad(set_to_none=True)
        self._loss = 0.0

    @property
    def problem(self) -> str | None:
        """Why the step cannot be made, behind the backward pass; None: it can."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        self._norm = torch.nn.utils.get_total_norm(gradients)
        if math.isfinite(self._loss) and bool(self._norm.isfinite()):
            return None
        what = f"the loss is {self._loss}" if not math.isfinite(self._loss) else "its gradient is no number"
        rate = self.prepared.learning_rate
        return f"step {self.progress.step + 1}: {what}; lower learning_rate (now {rate:g})"

    def step(self) -> float:
        """Make the step, behind `problem`; returns its loss."""
        recipe = self.prepared.training
        set_rate(self._optimiser, self.prepared.learning_rate, self.progress.step, self._num_steps, recipe)
        torch.nn.utils.clip_grads_with_norm_(self._parameters, recipe.max_grad_norm, self._norm)
        self._optimiser.step()
        loss = self._loss
        self.clear()
        self.progress.step += 1
        self._is_due = self.progress.step in self._evaluate_at
        self._next_step()
        return loss

    def note(self, scores: dict[str, float]) -> None:
        """Fresh dev scores."""
        if note_scores(self.progress, scores, self.prepared.training):
            self.best = self.module.kept()
        self._is_due = False

    def save(self, *, at_once: bool = False) -> None:
        """A checkpoint, where one is due."""
        if self._checkpoint is None or self.progress.step == self._saved_step:
            return
        now = time.monotonic()
        if at_once or now - self._saved >= self.prepared.training.checkpoint_seconds:
            digest = self.prepared.digest
            save_checkpoint(self._checkpoint, digest, self.progress, self.module, self._optimiser, self.best)
            self._saved, self._saved_step = now, self.progress.step

    def forget(self) -> None:
        """Remove the checkpoint."""
        if self._checkpoint is not None:
            self._checkpoint.unlink(missing_ok=True)

    def outcome(self) -> Outcome:
        """What came of it."""
        if not self._evaluate_at:
            self.progress.best_step, self.best = self.progress.step, self.module.kept()
        return Outcome(self.progress, self.best, self.form)

    def _next_step(self) -> None:
        self.units = next(self._plan, []) if self.num_steps_left else []
        if self.units:
            self._size = StepSize.of(self.prepared.train_set, self.units)
            self.extent = Extent.of(self.prepared.train_set, self.units, self.form)

    def _go_on(self, checkpoint: Path) -> None:
        """One of other data, or a broken one, is none: this user starts anew."""
        try:
            self.progress, self.best = load_checkpoint(checkpoint, self.prepared.digest, self.module, self._optimiser)
        except TrainingError:
            checkpoint.unlink()
