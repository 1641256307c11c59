"""How long a run is, when it is measured, and how its learning rate goes."""

from __future__ import annotations

import math

from antefix.data.encode import Encoded
from antefix.training.recipe import TrainingRecipe


def planned_steps(train_set: Encoded, recipe: TrainingRecipe) -> int:
    """How many optimiser steps the run takes."""
    return planned_steps_of(train_set.pairs_of_epoch, recipe)


def planned_steps_of(pairs_of_epoch: int, recipe: TrainingRecipe) -> int:
    """How many optimiser steps a run takes whose epochs have so many pairs."""
    if recipe.max_steps is not None:
        return recipe.max_steps
    return max(1, math.ceil(recipe.epochs * pairs_of_epoch / recipe.pairs_per_step))


def evaluation_steps(num_steps: int, evaluations: int) -> set[int]:
    """After which steps dev scores are measured, the last one among them."""
    return {math.ceil(num_steps * (n + 1) / evaluations) for n in range(evaluations)}


def rate_at(step: int, peak: float, num_steps: int, recipe: TrainingRecipe) -> float:
    """The learning rate of a step, counted from 0."""
    warmup = math.ceil(0.05 * num_steps) if recipe.warmup_steps is None else recipe.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if recipe.schedule == "linear":
        return peak * (num_steps - step) / max(num_steps - warmup, 1)
    return peak
