"""Users: whose prefixes are trained together, one for each value of a column. Knows names and examples, no model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from antefix.data.example import Example
from antefix.data.groups import Groups, Values, read_groups
from antefix.data.sample import sample_frames, sample_pairs, split_examples
from antefix.digest import digest
from antefix.errors import TrainingError
from antefix.training.recipe import Recipe

MOST_NAME_CHARACTERS = 100
"""As long as a bank's names may be."""
_DIGEST_CHARACTERS = 10
_PLAIN = re.compile(r"[A-Za-z0-9-]", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """One of those who get a prefix of their own."""

    name: str
    """Of the prefix in its bank."""
    by: Mapping[str, str]
    """Column -> value: what tells the user from others."""
    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    """Empty: the data is one source alone, and the last step is kept."""

    @property
    def num_pairs(self) -> int:
        """Pairs that are trained on."""
        return pairs_of(self.train)


@dataclass(frozen=True, slots=True)
class Skipped:
    """Somebody with too few pairs."""

    by: Mapping[str, str]
    num_pairs: int


@dataclass(frozen=True, slots=True)
class Users:
    """Everybody in a data set."""

    users: list[User]
    skipped: list[Skipped]
    without_value: Mapping[str, int]
    """Rows that are nobody's, by the column in which they have nothing."""


def users_of(recipe: Recipe, by: Sequence[str], min_pairs: int, *, keep_empty: bool = False) -> Users:
    """Read a recipe's data in groups; each has a dev set of its own, as the recipe says for one.

    `data.pairs` is the most that each gets. min_pairs: who has fewer is skipped. keep_empty: see `read_groups`.
    Raises DataError for columns that are not there, TrainingError for two users of the same name, and where all are
    skipped.
    """
    data = recipe.data
    options = {"keep_empty": keep_empty, "format": data.format, **data.reader}
    groups = read_groups(data.train, by, **options)
    dev = None if data.dev is None else read_groups(data.dev, by, **options)
    enough = {values: some for values, some in groups.examples.items() if pairs_of(some) >= min_pairs}
    skipped = [
        Skipped(_named(by, values), pairs_of(some)) for values, some in groups.examples.items() if values not in enough
    ]
    if not enough:
        most = max(one.num_pairs for one in skipped)
        raise TrainingError(
            f"{data.train}: nobody has {min_pairs} pairs, the most is {most}: take --min-pairs {most} or fewer, or "
            "other columns"
        )
    names = {values: user_prefix_name(recipe.name, values) for values in enough}
    _refuse_collisions(names)
    users = [_user(recipe, groups.by, values, names[values], some, dev) for values, some in enough.items()]
    return Users(users, skipped, groups.without_value)


def pairs_of(examples: Iterable[Example]) -> int:
    """Source/target pairs."""
    return sum(len(e.targets) for e in examples)


def user_prefix_name(recipe_name: str, values: Values) -> str:
    """The prefix's name for these values: `menus.Fern_Hill.less_than___a3_20`.

    Letters, digits and `-` stay, a space becomes `_`, any other character `__` and its number in hexadecimal digits and
    `_`; so a value can be read back. A name that is too long for a bank is cut, and ends with a digest of the values.
    """
    name = ".".join([recipe_name, *("".join(_written(c) for c in value) for value in values)])
    if len(name) <= MOST_NAME_CHARACTERS:
        return name
    return f"{name[: MOST_NAME_CHARACTERS - _DIGEST_CHARACTERS - 1]}-{digest(repr(values))[:_DIGEST_CHARACTERS]}"


def _written(character: str) -> str:
    if character == " ":
        return "_"
    return character if _PLAIN.match(character) else f"__{ord(character):x}_"


def _refuse_collisions(names: Mapping[Values, str]) -> None:
    first: dict[str, Values] = {}
    for values, name in names.items():
        if name in first:
            raise TrainingError(
                f"the values {', '.join(first[name])!r} and {', '.join(values)!r} would both be the prefix '{name}': "
                "write one of them otherwise"
            )
        first[name] = values


def _named(by: Sequence[str], values: Values) -> dict[str, str]:
    return dict(zip(by, values, strict=True))


def _user(
    recipe: Recipe, by: Sequence[str], values: Values, name: str, examples: Sequence[Example], dev: Groups | None
) -> User:
    data, seed = recipe.data, recipe.training.seed
    if dev is not None:
        train, held_out = list(examples), dev.examples.get(values, [])
    elif len(examples) > 1:
        train, held_out = split_examples(examples, data.dev_fraction, seed)
    else:
        train, held_out = list(examples), []
    if data.samples_per_label is not None:
        train = sample_frames(train, data.samples_per_label, seed)
    return User(
        name=name,
        by=_named(by, values),
        train=tuple(_at_most(train, data.pairs, seed)),
        dev=tuple(_at_most(held_out, data.dev_pairs, seed)),
    )


def _at_most(examples: Sequence[Example], pairs: int | None, seed: int) -> Sequence[Example]:
    return examples if pairs is None or pairs >= pairs_of(examples) else sample_pairs(examples, pairs, seed)
