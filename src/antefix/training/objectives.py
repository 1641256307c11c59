"""Losses: from a batch to one number a pair, from these to one number a step.

Only target tokens carry loss (Li & Liang 2021, equation 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from antefix.data.encode import Encoded
from antefix.data.plan import Unit

LossReduction = Literal["token_mean", "example_sum", "example_sum_over_row", "example_sum_over_longest"]


class RankingWeights(BaseModel):
    """What each loss of examples with choices counts; see `antefix.training.ranking`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    language_model: float = Field(1.0, ge=0)
    """Weight of the right choice's own loss."""
    unlikelihood: float = Field(1.0, ge=0)
    """Weight of the loss that makes tokens of wrong choices unlikely."""
    length_normalised: float = Field(1.0, ge=0)
    """Weight of the cross-entropy over choices, each scored by the mean of its tokens."""
    length_norm: float = Field(1.0, ge=0)
    """A choice's log-likelihood is divided by its length to this power, in the loss and in ranking."""


@dataclass(frozen=True, slots=True)
class StepSize:
    """What the reductions divide by: counts over a whole optimiser step, all processes together."""

    num_pairs: int
    num_target_tokens: int
    longest_target: int
    longest_row: int
    """Source and target of one pair, padded beside each other."""
    num_right_tokens: int = 0
    """Where targets are choices: tokens of right ones, and of wrong ones."""
    num_wrong_tokens: int = 0

    @classmethod
    def of(cls, data: Encoded, units: Sequence[Unit]) -> StepSize:
        """Of all units of a step."""
        chosen = [(data.examples[unit.example], unit) for unit in units]
        pairs = [(len(e.source), len(e.targets[t])) for e, unit in chosen for t in unit.targets]
        num_tokens = sum(target for _, target in pairs)
        right = sum(len(e.targets[e.right]) for e, _ in chosen if e.right >= 0)
        return cls(
            num_pairs=sum(data.pairs_in(len(unit.targets)) for unit in units),
            num_target_tokens=num_tokens,
            longest_target=max(target for _, target in pairs),
            longest_row=max(source + target - 1 for source, target in pairs),
            num_right_tokens=right,
            num_wrong_tokens=num_tokens - right,
        )


def reduce_losses(losses_M: Tensor, size: StepSize, reduction: LossReduction) -> Tensor:
    """One number for the pairs of a (part of a) step; parts of a step add up.

    `token_mean`: mean over target tokens. `example_sum`: sum over a pair's tokens, mean over pairs, the
    default of the paper's code (its `objective_mode` 1; token mean is mode 0, the row-length form mode 2 and
    the longest-target form mode 3).
    """
    total = losses_M.sum()
    if reduction == "token_mean":
        return total / size.num_target_tokens
    mean = total / size.num_pairs
    if reduction == "example_sum_over_row":
        return mean / size.longest_row
    if reduction == "example_sum_over_longest":
        return mean / size.longest_target
    return mean
