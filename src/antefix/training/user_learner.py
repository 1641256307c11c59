"""One user's prefix among many in training. It knows nothing of the others: what it needs next it says in `needs`, and
who feeds it tells it what came of that."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from torch import Tensor

from antefix.batches.form import BatchForm
from antefix.data.plan import all_units
from antefix.errors import TrainingError
from antefix.training.learner import Learner, Outcome
from antefix.training.mixing import Extent
from antefix.training.objectives import StepSize, reduce_losses
from antefix.training.prepared import Prepared
from antefix.training.users import User

Need = Literal["step", "dev_scores", "base_loss"]


class UserLearner:
    """A user at work. Reads the checkpoint of an interrupted run, if it is of this training."""

    def __init__(self, user: User, prepared: Prepared, form: BatchForm, checkpoint: Path | None) -> None:
        self.user, self.prepared, self.form = user, prepared, form
        self.module = prepared.module.to(prepared.base.model.device).train()
        self.learner = Learner(
            self.module,
            prepared.training,
            learning_rate=prepared.learning_rate,
            num_steps=prepared.num_steps,
            digest=prepared.digest,
            checkpoint=checkpoint,
            has_dev_scores=prepared.dev_set.num_pairs > 0,
        )
        try:
            self.learner.go_on()
        except TrainingError:  # of other data, or broken: this user starts anew
            self.learner.forget()
        self.base_loss: float | None = None
        """Dev loss of the bare base."""
        self.dev_units = all_units(prepared.dev_set)
        self.dev_extent = Extent.of(prepared.dev_set, self.dev_units, form)
        self.extent = Extent(0, 0, 0)
        """Of the rows of the next step."""
        self._plan = self.learner.plan(prepared.train_set)
        self._loss = 0.0
        self._next_step()

    @property
    def steps_done(self) -> int:
        """How far it is."""
        return self.learner.progress.step

    @property
    def needs(self) -> Need | None:
        """What is to be done next; None: it is over."""
        if self.learner.is_due:
            return "dev_scores"
        if self.learner.num_steps_left:
            return "step"
        # Padding that stands where soft tokens do is nothing that the bare base ever reads.
        if self.learner.has_dev_scores and self.base_loss is None and self.module.num_inserted_tokens == 0:
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
        self.learner.clear()
        self._loss = 0.0

    def check_gradients(self) -> TrainingError | None:
        """After the backward pass and before `step`: why the step cannot be made; None: it can."""
        return self.learner.check_gradients(self._loss)

    def step(self) -> float:
        """Make the step, after `check_gradients`; returns its loss."""
        self.learner.step()
        loss, self._loss = self._loss, 0.0
        self._next_step()
        return loss

    def outcome(self) -> Outcome:
        """What came of it."""
        return self.learner.outcome(self.form)

    def _next_step(self) -> None:
        self.units = next(self._plan, []) if self.learner.num_steps_left else []
        if self.units:
            self._size = StepSize.of(self.prepared.train_set, self.units)
            self.extent = Extent.of(self.prepared.train_set, self.units, self.form)
