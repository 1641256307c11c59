"""What every method answers. Shared code asks these questions and never for a method's name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, Self

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from antefix.base import Base
from antefix.parts.initial import Positions
from antefix.parts.key_value import KeyValue
from antefix.sites import Sites


class MethodConfig(BaseModel):
    """The choices of one method; checked once, never changed afterwards."""

    # What stands under a field is its description, also in docs/recipe.md.
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @property
    def parent(self) -> str | None:
        """The folder of the kept prefix that training starts from; None: it starts from no other."""
        return None


class Method(Protocol):
    """One prefix under a method: a torch module whose parameters are what is trained."""

    Config: ClassVar[type[MethodConfig]]
    summary: ClassVar[str]
    """One line for tables of methods: what it does and where it comes from."""

    @classmethod
    def default_learning_rate(cls, config: Any) -> float:
        """The learning rate that fits this parametrisation."""
        ...

    @classmethod
    def build(cls, base: Base, config: Any) -> Self:
        """A fresh prefix, ready to be trained. Raises PrefixError where the base lacks what it needs."""
        ...

    @classmethod
    def restore(cls, sites: Sites, config: Any, tensors: Mapping[str, Tensor]) -> Self:
        """A kept prefix. Raises PrefixError for tensors that do not fit the sites."""
        ...

    @property
    def positions(self) -> Positions:
        """Where the tokens stand beside the slots."""
        ...

    @property
    def num_virtual_tokens(self) -> int:
        """How many slots a site holds."""
        ...

    @property
    def for_targets(self) -> bool:
        """Whether targets alone see the slots: a source is then read as the base reads it."""
        ...

    def slots(self) -> Mapping[str, KeyValue]:
        """The key/value slots by site name, differentiable with respect to the parameters."""
        ...

    def kept_tensors(self) -> dict[str, Tensor]:
        """What a prefix file holds, by tensor name: folded, float32, on the processor."""
        ...


class MethodModule(nn.Module, Method):  # the two together, for annotations
    """A method's module."""
