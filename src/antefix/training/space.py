"""What a search varies: ranges of a recipe's keys, and how many of their values are tried.

Knows what a range is; never what a recipe is (`antefix.training.recipe` checks that a key exists and takes these
values), and nothing of who draws from it.
"""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Value = bool | int | float | str
"""What a search can put into a recipe."""


class _Section(BaseModel):
    # What stands under a field is its description, also in docs/recipe.md.
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Range(_Section):
    """The values of one key: from `low` to `high`, or one of `choices`."""

    low: float | int | None = None
    """The smallest value. Two integers make a range of integers: write 0.0 for one of numbers."""
    high: float | int | None = None
    """The largest value."""
    log: bool = False
    """Equal chances for equal ratios, as suits a learning rate: 0.001 to 0.01 as much as 0.01 to 0.1."""
    choices: tuple[Value, ...] | None = None
    """In the place of bounds: the values themselves, without an order."""

    @field_validator("low", "high", "choices", mode="before")
    @classmethod
    def _has_values_of_a_recipe(cls, given: Any) -> Any:
        for value in given if isinstance(given, list | tuple) else [given]:
            if not isinstance(value, bool | int | float | str | None):
                raise ValueError("a search takes numbers, texts, true and false")
        return given

    @field_validator("low", "high", mode="before")
    @classmethod
    def _is_a_number(cls, given: Any) -> Any:
        if isinstance(given, bool | str):
            raise ValueError("a bound is a number; other values go into `choices`")
        return given

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.log:
                raise ValueError("`choices` stand alone: leave out low, high and log")
            if not self.choices or len(set(self.choices)) < len(self.choices):
                raise ValueError("`choices` are one or more different values")
        elif self.low is None or self.high is None:
            raise ValueError("give low and high, or choices")
        elif self.low >= self.high:
            raise ValueError(f"low, {self.low:g}, must be below high, {self.high:g}")
        elif self.log and self.low <= 0:
            raise ValueError(f"with log, low must be above 0, and is {self.low:g}")
        return self

    @property
    def edges(self) -> tuple[Value, ...]:
        """The values that a recipe has to take: the bounds, or every choice."""
        if self.choices is not None:
            return self.choices
        assert self.low is not None
        assert self.high is not None
        return (self.low, self.high)


class SearchRecipe(_Section):
    """What `antefix search` tries."""

    trials: int = Field(10, ge=1)
    """How many settings are tried; more of them later go on from those that are done."""
    seed: int = 0
    """Seed of the draws: with it the same trials come again."""
    prune: bool = False
    """End a trial early whose best dev score so far is worse than the median of the others at the same evaluation."""
    space: dict[str, Range] = Field(default_factory=dict)
    """Ranges by dotted key: `"training.learning_rate" = {low = 1e-3, high = 1e-1, log = true}`. Without any: the
    learning rate, from a tenth of the method's default to ten times as much."""

    @field_validator("space", mode="before")
    @classmethod
    def _by_dotted_key(cls, given: Any) -> Any:
        return _flat(given) if isinstance(given, dict) else given


def _flat(space: dict[str, Any], parent: str = "") -> dict[str, Any]:
    """A key without quotes is a section of a section to TOML, and on the command line; a quoted one gives way to it."""
    quoted: dict[str, Any] = {}
    nested: dict[str, Any] = {}
    for name, inner in space.items():
        key = f"{parent}{name}"
        if isinstance(inner, dict) and inner and all(isinstance(value, dict) for value in inner.values()):
            nested |= _flat(inner, f"{key}.")
        else:
            quoted[key] = inner
    return quoted | nested
