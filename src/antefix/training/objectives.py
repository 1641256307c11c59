"""Losses: from a batch to one number a pair, from these to one number a step.

Only target tokens carry loss (Li & Liang 2021, equation 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from antefix.training.batch import Batch
from antefix.training.head import label_losses

LossReduction = Literal["token_mean", "example_sum", "example_sum_over_row", "example_sum_over_longest"]


def pair_losses(model: PreTrainedModel, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
    """The summed negative log-likelihood of every pair's target, shape (M,), float32.

    label_smoothing e: (1 - e) times the label's share plus e times the mean over the vocabulary.
    """
    losses_N = label_losses(model, batch, label_smoothing)
    if batch.weight is not None:
        losses_N = losses_N * batch.weight
    return torch.zeros(batch.num_pairs, device=losses_N.device).index_add(0, batch.pair, losses_N)


@dataclass(frozen=True, slots=True)
class StepSize:
    """What the reductions divide by: counts over a whole optimiser step, all processes together."""

    num_pairs: int
    num_target_tokens: int
    longest_target: int
    longest_row: int
    """Source and target of one pair, padded beside each other."""


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
