"""What is at work in a model: what prefixes are in one forward pass, and what their sites ask of an attachment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from antefix.attention.branch import Branch, Condition, Places
from antefix.attention.forest import Forest
from antefix.attention.hook import bare
from antefix.methods.base import MethodModule
from antefix.parts.inserted import Inserted
from antefix.parts.key_value import KeyValue
from antefix.parts.linear import LinearPart
from antefix.parts.rows import EncoderRows
from antefix.passes import Passes
from antefix.sites import Kind

BARE = -1
"""The row index of a row without a prefix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What a prefix is in one forward pass: by site name, and by the path of a linear layer."""

    slots: Mapping[str, KeyValue]
    branches: Mapping[str, Sequence[Branch]]
    rows: EncoderRows | None
    linear: Mapping[str, LinearPart]
    inserted: Inserted | None
    new_tokens: Tensor | None

    @classmethod
    def of(cls, module: MethodModule) -> Made:
        with bare():
            return cls(
                slots=module.slots(),
                branches=module.branches(),
                rows=module.encoder_rows(),
                linear=module.linear_parts(),
                inserted=module.inserted(),
                new_tokens=module.new_tokens(),
            )

    @classmethod
    def nothing(cls) -> Made:
        """Of a prefix that no row has."""
        return cls(slots={}, branches={}, rows=None, linear={}, inserted=None, new_tokens=None)

    def tensors(self) -> list[Tensor]:
        """All that it is made of."""
        of_branches = [t for branches in self.branches.values() for branch in branches for t in branch.tensors()]
        of_rows = [] if self.rows is None else [self.rows.first_PC, *self.rows.added.values()]
        of_linear = [t for part in self.linear.values() for t in part.tensors()]
        of_inserted = [] if self.inserted is None else self.inserted.tensors()
        of_tokens = [] if self.new_tokens is None else [self.new_tokens]
        of_slots = [t for pair in self.slots.values() for t in pair]
        return [*of_slots, *of_branches, *of_rows, *of_linear, *of_inserted, *of_tokens]


class AtWork(Protocol):
    """What a site must know of an attachment."""

    passes: Passes

    @property
    def trainable(self) -> bool: ...

    @property
    def shared_index(self) -> int | None: ...

    @property
    def forest(self) -> Forest | None: ...

    @property
    def num_rows(self) -> int: ...

    def rows_of(self, num_rows: int) -> Tensor | int: ...

    def index_of_tokens(self, num_rows: int) -> Tensor | int: ...

    def made(self) -> Sequence[Made]: ...

    def is_for_targets(self, index: int) -> bool: ...

    def is_target(self) -> Tensor | None: ...

    def places(self, kind: Kind, query: Tensor) -> Places: ...

    def condition_of(self, num_rows: int) -> Condition: ...


class Stack(Protocol):
    """What all attached prefixes have in one place of the model."""

    def install(self, modules: Mapping[str, nn.Module]) -> None:
        """Go to work. modules: the model's, by path."""
        ...

    def uninstall(self, modules: Mapping[str, nn.Module]) -> None:
        """Rest."""
        ...

    def forget(self) -> None:
        """What was gathered for rows is no longer true."""
        ...
