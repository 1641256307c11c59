"""Soft tokens that stand between a source and its target, in the places of tokens that are fed.

Axes: P tokens, C width of embeddings, O width of a linear layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


class Inserted(NamedTuple):
    """What stands in the last P places of every source."""

    rows_PC: Tensor
    """Their embeddings."""
    added: Mapping[str, Tensor]
    """By the path of a linear layer: (P, O), added to what it gives for them."""

    def tensors(self) -> list[Tensor]:
        """All that it is made of."""
        return [self.rows_PC, *self.added.values()]
