"""A whole run for many users: who is to be trained, from where they start, and what is kept in the bank.

The bank is the run's memory: a prefix that is kept there with its user's data and this recipe on its card is done. In
the run's folder stand only the checkpoints of those in the middle, and the report.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from antefix.bank import Bank
from antefix.base import Base
from antefix.data.linearise import default_format
from antefix.errors import TrainingError
from antefix.methods import method_class
from antefix.prefix import Prefix, read_card
from antefix.tasks import TextTask
from antefix.training.identity import Identity, identity_of, is_done, recipe_digest
from antefix.training.loop import StepReport
from antefix.training.prepared import Prepared, built, prepare_recipe
from antefix.training.recipe import Recipe, with_values
from antefix.training.run import run
from antefix.training.schedule import planned_steps_of
from antefix.training.shareable import check_shareable
from antefix.training.team import Work
from antefix.training.users import User, Users

CHECKPOINTS_FOLDER, SHARED_FOLDER = "users", "shared"


@dataclass(frozen=True, slots=True, kw_only=True)
class ManyPlan:
    """What a run has to do."""

    recipe: Recipe
    """With the text format of all users together, and where they start."""
    digest: str
    everybody: Users
    waiting: tuple[User, ...]
    """Who is to be trained."""

    @property
    def unchanged(self) -> list[User]:
        """Whose prefix is in the bank already."""
        waiting = {user.name for user in self.waiting}
        return [user for user in self.everybody.users if user.name not in waiting]


def plan_many(recipe: Recipe, everybody: Users, *, overwrite: bool = False) -> ManyPlan:
    """Who of these users is to be trained. Raises TrainingError for a name that is another prefix's."""
    digest, bank = recipe_digest(recipe), Bank(recipe.bank)
    waiting = tuple(user for user in everybody.users if not is_done(bank, user, digest, overwrite=overwrite))
    sources = [e.source for user in everybody.users for e in user.train]
    text = default_format(sources).to_dict() | recipe.data.text
    data = recipe.data.model_copy(update={"text": text})
    return ManyPlan(
        recipe=recipe.model_copy(update={"data": data}), digest=digest, everybody=everybody, waiting=waiting
    )


def work_of(
    plan: ManyPlan, users: Sequence[User], base: Base, fail: Callable[[User, str], None],
    *, tokens_at_work: int | None = None,
) -> Work:  # fmt: skip
    """The work of training these users of a plan into its bank.

    Raises TrainingError for a recipe whose prefixes cannot share a forward pass.
    """
    recipe = plan.recipe
    torch.manual_seed(recipe.training.seed)
    fresh = built(base, recipe.method, recipe.method_config, TextTask())
    check_shareable(recipe, fresh)
    bank = Bank(recipe.bank)

    def prepare(user: User) -> Prepared:
        return prepare_recipe(recipe, (user.train, user.dev), base, deepcopy(fresh))

    def keep(user: User, prefix: Prefix) -> None:
        card = identity_of(user, plan.digest).on_card(prefix.card)
        card = card.model_copy(update={"tags": (*card.tags, *(f"{c}={v}" for c, v in user.by.items()))})
        replace(prefix, card=card).save(bank.path(user.name), overwrite=True)

    return Work(
        users=users,
        prepare=prepare,
        keep=keep,
        fail=fail,
        planned_steps=lambda user: planned_steps_of(user.num_pairs, recipe.training),
        checkpoints=recipe.run_folder / CHECKPOINTS_FOLDER,
        tokens_at_work=tokens_at_work,
        tags=recipe.tags,
        licence=recipe.licence,
        notes=recipe.notes,
    )


def started_from(recipe: Recipe, prefix: Path) -> Recipe:
    """The recipe whose prefixes start from a kept one. Raises TrainingError for a method that cannot."""
    fields = method_class(recipe.method).Config.model_fields
    if "initial_prefix" not in fields:
        raise TrainingError(
            f"{recipe.method} cannot start from a kept prefix: leave --shared out, or take prefix_tuning"
        )
    values = {"config.initial_prefix": str(prefix)}
    return with_values(recipe, values | ({"config.initial": "prefix"} if "initial" in fields else {}))


def shared_is_kept(recipe: Recipe) -> bool:
    """Whether the bank has the prefix that all users start from. Raises TrainingError where it has another one."""
    if not recipe.prefix_folder.exists():
        return False
    identity = Identity.of_card(read_card(recipe.prefix_folder))
    if identity is None or identity.by or identity.recipe != recipe_digest(recipe):
        raise TrainingError(
            f"{recipe.prefix_folder} was not trained by this recipe for all to start from: remove it, or give "
            "the recipe another name"
        )
    return True


def train_shared(
    recipe: Recipe, everybody: Users, base: Base, watch: Callable[[StepReport], None],
    stop_requested: Callable[[], bool],
) -> None:  # fmt: skip
    """Train a prefix on the rows of all users and keep it under the recipe's own name; goes on from its checkpoint.

    No user's dev set is trained on. The kept one stays when data change: else all users would be trained anew.
    """
    train = [e for user in everybody.users for e in user.train]
    dev = [e for user in everybody.users for e in user.dev]
    prepared = prepare_recipe(recipe, (train, dev), base)
    prefix = run(
        prepared, recipe.run_folder / SHARED_FOLDER, watch, stop_requested=stop_requested,
        tags=recipe.tags, licence=recipe.licence, notes=recipe.notes,
    )  # fmt: skip
    everyone = User(name=recipe.name, by={}, train=tuple(train), dev=tuple(dev))
    card = identity_of(everyone, recipe_digest(recipe)).on_card(prefix.card)
    replace(prefix, card=card).save(recipe.prefix_folder)
