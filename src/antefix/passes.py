"""What forward passes leave behind for layers that are computed again in the backward pass.

With activation checkpointing a layer's second computation finds what the latest forward pass left, whichever pass it
belongs to. That is the same as long as passes leave the same; where they do not, gradients would be wrong in silence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from antefix.errors import PrefixError


class Passes:
    """The forward passes since the last one that was computed again."""

    def __init__(self) -> None:
        self._left: list[Tensor | None] | None = None
        self._differ = False
        self._is_over = False

    def enter(self, left: Sequence[Tensor | None]) -> None:
        """A forward pass begins, and leaves these."""
        if self._is_over:
            self._left, self._differ, self._is_over = None, False, False
        detached = [None if t is None else t.detach() for t in left]
        self._differ = self._differ or (self._left is not None and not _equal(self._left, detached))
        self._left = detached

    def look(self) -> None:
        """Somebody looks at what was left. Raises PrefixError where it may not be his."""
        if torch._C._current_graph_task_id() < 0:  # no backward pass is running
            return
        self._is_over = True
        if self._differ:
            raise PrefixError(
                "with activation checkpointing, forward passes before a backward pass must have the same roles and the "
                "same dropout: call backward after every pass"
            )


def _equal(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> bool:
    if len(one) != len(other):
        return False
    return all(
        a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in zip(one, other, strict=True)
    )
