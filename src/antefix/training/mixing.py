"""Units of several data sets in one forward pass, each row with its own prefix, and each data set's losses apart.

Axes: M pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from antefix.attachment import Attachment
from antefix.batches.form import BatchForm, batch_of
from antefix.batches.head import pair_losses
from antefix.data.encode import Encoded
from antefix.data.plan import Unit, microbatches, row_tokens


@dataclass(frozen=True, slots=True)
class Share:
    """What one user has in a forward pass."""

    owner: int
    """Which of those at work."""
    row: int
    """Which of the attached prefixes its rows carry; below 0: none."""
    data: Encoded
    units: Sequence[Unit]


@dataclass(frozen=True, slots=True)
class Mixed:
    """A forward pass of several."""

    losses_M: Tensor
    owner_M: Tensor

    def of(self, owner: int) -> Tensor:
        """One owner's losses."""
        return self.losses_M[self.owner_M == owner]

    @property
    def owners(self) -> list[int]:
        """Who has a pair in it."""
        return [int(n) for n in torch.unique(self.owner_M)]


def passes(
    model: PreTrainedModel, attachment: Attachment, shares: Sequence[Share], form: BatchForm, tokens_per_batch: int,
    label_smoothing: float = 0.0,
) -> Iterator[Mixed]:  # fmt: skip
    """All units of these shares, in forward passes of at most so many tokens, each as full as it can be."""
    owners = [share for share in shares for _ in share.units]
    units = [Unit(n, unit.targets) for n, unit in enumerate(unit for share in shares for unit in share.units)]
    examples = tuple(share.data.examples[unit.example] for share in shares for unit in share.units)
    together = Encoded(examples, 0, 0, for_encoder=form == "encoder_decoder")
    for part in microbatches(together, units, tokens_per_batch, packed=form == "packed"):
        attachment.rows = [owners[unit.example].row for unit in part]
        pairs = [owners[unit.example] for unit in part for _ in unit.targets]
        losses_M = pair_losses(model, batch_of(form, together, part, model), label_smoothing)
        yield Mixed(losses_M, torch.tensor([share.owner for share in pairs], device=losses_M.device))


@dataclass(frozen=True, slots=True)
class Extent:
    """How much of a forward pass some units take."""

    num_rows: int
    num_tokens: int
    longest_row: int

    @classmethod
    def of(cls, data: Encoded, units: Sequence[Unit], form: BatchForm) -> Extent:
        """Of units that are fed in this form."""
        if form != "packed":
            units = [Unit(unit.example, (target,)) for unit in units for target in unit.targets]
        tokens = [row_tokens(data, unit) for unit in units]
        return cls(len(tokens), sum(tokens), max(tokens, default=0))

    def beside(self, other: Extent) -> Extent:
        """Both together."""
        return Extent(
            self.num_rows + other.num_rows,
            self.num_tokens + other.num_tokens,
            max(self.longest_row, other.longest_row),
        )

    def tokens_fed(self, form: BatchForm) -> int:
        """Padding included."""
        return self.num_tokens if form == "packed" else self.num_rows * self.longest_row
