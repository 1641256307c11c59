"""What makes a user's training the same as one that was done: the user's data, and the recipe with all it starts from.

Both digests are written on the card of the prefix. So the bank itself says what is done, whoever trained it, and a user
whose data did not change is not trained again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from antefix.bank import Bank
from antefix.digest import digest
from antefix.errors import PrefixError, TrainingError
from antefix.prefix import Card
from antefix.tensor_file import TENSORS_FILE, sha256_of
from antefix.training.recipe import Recipe
from antefix.training.run import data_hash
from antefix.training.users import User

MANY = "many"
"""Under which key of a card's training record they stand."""
_CHANGES_NOTHING: dict[str, Any] = {
    "name": True, "bank": True, "run": True, "tags": True, "licence": True, "notes": True, "search": True,
    "data": {"train", "dev"}, "config": {"initial_prefix"},
    "training": {"checkpoint_seconds", "trackers", "tokens_per_batch", "activation_checkpointing", "packed"},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Identity:
    """Of one user's training."""

    by: Mapping[str, str]
    data: str
    recipe: str

    def on_card(self, card: Card) -> Card:
        """The card with this on it."""
        record = {"by": dict(self.by), "data": self.data, "recipe": self.recipe}
        return card.model_copy(update={"training": {**card.training, MANY: record}})

    @classmethod
    def of_card(cls, card: Card) -> Identity | None:
        """What a card says of it; None: its prefix was not trained for a user."""
        record = card.training.get(MANY)
        try:
            return None if record is None else cls(dict(record["by"]), str(record["data"]), str(record["recipe"]))
        except (KeyError, TypeError, ValueError):
            return None


def recipe_digest(recipe: Recipe) -> str:
    """Sixteen hexadecimal digits of all that decides what is learned, the prefix that it starts from included.

    Choices that are the default are left out: one that a later version adds makes no other recipe of it.
    """
    content = recipe.model_dump_json(exclude=_CHANGES_NOTHING, exclude_defaults=True)
    parent = recipe.method_config.parent
    started_from = "" if parent is None else sha256_of(Path(parent) / TENSORS_FILE)
    return digest(content, started_from)


def identity_of(user: User, of_recipe: str) -> Identity:
    """Of a user under a recipe of this digest."""
    return Identity(user.by, digest(data_hash(user.train), data_hash(user.dev)), of_recipe)


def is_done(bank: Bank, user: User, of_recipe: str, *, overwrite: bool) -> bool:
    """Whether the bank has this user's prefix, trained on this data by this recipe.

    overwrite: that what is there may be replaced where it is another's, or of another recipe. Raises TrainingError
    where it is and may not; what was trained on other data of the same user may always be replaced.
    """
    if user.name not in bank:
        return False
    try:
        kept = Identity.of_card(bank.card(user.name))
    except PrefixError as error:
        if overwrite:
            return False
        raise TrainingError(f"{error}; --overwrite trains it anew") from error
    wanted = identity_of(user, of_recipe)
    if kept == wanted:
        return True
    if overwrite or (kept is not None and (kept.by, kept.recipe) == (wanted.by, wanted.recipe)):
        return False
    why = "was not trained for this user" if kept is None or kept.by != wanted.by else "was trained by another recipe"
    raise TrainingError(
        f"{bank.path(user.name)} {why}: give the recipe another name, or say --overwrite to train it anew"
    )
