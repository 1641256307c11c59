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
    """The forward passes that may still be computed again, and what the latest pass left."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._pending: list[Tensor | None] | None = None  # what the first pass left whose backward pass is to come
        self._differ = False
        self._is_over = False

    def enter(self, left: Sequence[Tensor | None], *, recomputes: bool) -> None:
        """A forward pass begins, and leaves these. recomputes: whether the model's layers are computed again at all."""
        if self._is_over or not recomputes:
            self._forget()
        if not recomputes:
            return
        detached = [None if t is None else t.detach() for t in left]
        if self._pending is not None:
            self._differ = self._differ or not _equal(self._pending, detached)
        elif torch.is_grad_enabled():
            self._pending = detached

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
