"""A prefix on its way: its optimiser, schedule and steps, its best values so far, its early stop and its checkpoint.

Where its gradients come from it does not know: `train_loop` has them of forward passes of its own, `train_many` of
passes that several share. So a prefix becomes the same among others as alone.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.optimization import Adafactor

from antefix.batches.form import BatchForm
from antefix.data.encode import Encoded
from antefix.data.plan import Unit, steps
from antefix.errors import TrainingError
from antefix.methods.base import MethodModule
from antefix.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from antefix.training.recipe import TrainingRecipe
from antefix.training.schedule import evaluation_steps, rate_at


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished run."""

    progress: Progress
    tensors: dict[str, Tensor]
    """The kept tensors of the best step."""
    form: BatchForm


class Learner:
    """`module` in training under a recipe, whose schedule has its peak at `learning_rate`.

    digest: tells this run from others; a checkpoint of another run is refused. checkpoint: its file; None: there is
    none. has_dev_scores: whether the best step can be told.
    """

    def __init__(
        self, module: MethodModule, recipe: TrainingRecipe, *, learning_rate: float, num_steps: int, digest: str,
        checkpoint: Path | None, has_dev_scores: bool,
    ) -> None:  # fmt: skip
        self.module, self.recipe, self.num_steps = module, recipe, num_steps
        self.progress, self.best = Progress(), module.kept()
        self.has_dev_scores = has_dev_scores
        self._learning_rate, self._digest, self._checkpoint = learning_rate, digest, checkpoint
        groups = module.rate_scales()
        self.parameters = [p for params, _ in groups for p in params]
        self._optimiser = _optimiser([{"params": params, "scale": scale} for params, scale in groups], recipe)
        self._evaluate_at = evaluation_steps(num_steps, recipe.evaluations if has_dev_scores else 0)
        self._saved, self._saved_step = time.monotonic(), -1
        self._norm = torch.zeros(())

    def go_on(self) -> None:
        """From the checkpoint, if there is one. Raises TrainingError if it is of another run, or broken."""
        if self._checkpoint is not None and self._checkpoint.exists():
            self.progress, self.best = load_checkpoint(self._checkpoint, self._digest, self.module, self._optimiser)

    @property
    def num_steps_left(self) -> int:
        """At most: it may stop early."""
        return 0 if self.progress.stopped_early else self.num_steps - self.progress.step

    @property
    def is_due(self) -> bool:
        """Whether dev scores are to be measured before the next step."""
        measured = self.progress.dev_scores[-1]["step"] if self.progress.dev_scores else 0
        return self.progress.step in self._evaluate_at and measured < self.progress.step

    def plan(self, train_set: Encoded) -> Iterator[list[Unit]]:
        """The pairs of every step that is left, were it not to stop early."""
        recipe = self.recipe
        every = steps(
            train_set, pairs_per_step=recipe.pairs_per_step, targets_per_row=recipe.targets_per_row, seed=recipe.seed
        )
        return itertools.islice(every, self.progress.step, self.num_steps)

    def clear(self) -> None:
        """No gradients: the step begins, or begins anew."""
        self._optimiser.zero_grad(set_to_none=True)

    def check_gradients(self, loss: float) -> TrainingError | None:
        """After the backward pass and before `step`: why the step cannot be made; None: it can."""
        self._norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        step, rate = self.progress.step + 1, self._learning_rate
        if not math.isfinite(loss):
            return TrainingError(f"step {step}: the loss is {loss}; lower learning_rate (now {rate:g})")
        if not bool(self._norm.isfinite()):
            return TrainingError(f"step {step}: its gradient is no number; lower learning_rate (now {rate:g})")
        return None

    def step(self) -> float:
        """Make the step, after `check_gradients`; returns its learning rate."""
        rate = rate_at(self.progress.step, self._learning_rate, self.num_steps, self.recipe)
        for group in self._optimiser.param_groups:
            group["lr"] = rate * group["scale"]
        torch.nn.utils.clip_grads_with_norm_(self.parameters, self.recipe.max_grad_norm, self._norm)
        self._optimiser.step()
        self.clear()
        self.progress.step += 1
        return rate

    def note(self, scores: dict[str, float]) -> bool:
        """Fresh dev scores; True if this is the best step so far."""
        is_best = self.progress.note(scores, self.recipe)
        if is_best:
            self.best = self.module.kept()
        return is_best

    def save(self, *, at_once: bool = False) -> None:
        """A checkpoint, where one is due. Raises TrainingError when it cannot be written."""
        if self._checkpoint is None or self.progress.step == self._saved_step:
            return
        now = time.monotonic()
        if at_once or now - self._saved >= self.recipe.checkpoint_seconds:
            save_checkpoint(self._checkpoint, self._digest, self.progress, self.module, self._optimiser, self.best)
            self._saved, self._saved_step = now, self.progress.step

    def forget(self) -> None:
        """Remove the checkpoint."""
        if self._checkpoint is not None:
            self._checkpoint.unlink(missing_ok=True)

    def outcome(self, form: BatchForm) -> Outcome:
        """What came of it; of a run that is never measured the last step is the best."""
        if not self._evaluate_at:
            self.progress.best_step, self.best = self.progress.step, self.module.kept()
        return Outcome(self.progress, self.best, form)


def _optimiser(groups: list[dict[str, Any]], recipe: TrainingRecipe) -> torch.optim.Optimizer:
    if recipe.optimiser == "adafactor":
        return Adafactor(  # type: ignore[no-untyped-call]
            groups, lr=1.0, weight_decay=recipe.weight_decay, scale_parameter=True, relative_step=False
        )
    return torch.optim.AdamW(groups, lr=1.0, weight_decay=recipe.weight_decay)
