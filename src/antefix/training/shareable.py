"""Whether the prefixes of a recipe can share a forward pass without one changing what another learns."""

from __future__ import annotations

import torch

from antefix.at_work import Made
from antefix.errors import TrainingError
from antefix.methods.base import MethodModule
from antefix.tasks import TASKS
from antefix.training.recipe import Recipe


def check_shareable(recipe: Recipe, module: MethodModule) -> None:
    """module: a fresh prefix of the recipe. Raises TrainingError, with the reason, where they cannot."""
    if (reason := _reason(recipe, module)) is not None:
        raise TrainingError(f"{reason}; train one after another with `antefix train`, or change that")


def _reason(recipe: Recipe, module: MethodModule) -> str | None:
    method = recipe.method
    if not module.acts_on_rows:
        return f"{method} changes the base's own weights, which all rows of a batch share"
    if module.is_searched:
        return f"{method} is searched without gradients, and its candidates fill a batch by themselves"
    if not TASKS[recipe.task].writes_text:
        return f"task = '{recipe.task}' cannot be learned by many together, only text_generation can"
    if module.condition_length is not None:
        return f"{method} reads a second text for every source, which many together are not given"
    if module.symbols:
        return f"{method} learns new tokens, and texts with new tokens are not scored for many together"
    if recipe.training.keep_source_states:
        return "training.keep_source_states keeps the sources of one prefix in memory"
    if _draws(module):
        return f"{method} has dropout, whose draws would depend on who shares a batch (config.dropout)"
    if recipe.training.dev_metric != "loss" and recipe.decoding is not None and recipe.decoding.do_sample:
        return "decoding.do_sample draws the texts of training.dev_metric, which would depend on who shares a batch"
    return None


def _draws(module: MethodModule) -> bool:
    """Whether it draws at random while it is trained; found by looking."""
    before, was_training = torch.get_rng_state(), module.training
    module.train()
    with torch.no_grad():
        Made.of(module)
    module.train(was_training)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    return not torch.equal(before, after)
