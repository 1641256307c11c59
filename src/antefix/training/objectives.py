"""Losses: from a batch to one number a pair, from these to one number a step.

Only target tokens carry loss (Li & Liang 2021, equation 2). Logits are computed at label positions only, and
the cross-entropy needs no second copy of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from antefix.data.batch import Batch

LossReduction = Literal["token_mean", "example_sum", "example_sum_over_row", "example_sum_over_longest"]


def pair_losses(model: PreTrainedModel, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
    """The summed negative log-likelihood of every pair's target, shape (M,), float32.

    label_smoothing e: (1 - e) times the label's share plus e times the mean over the vocabulary.
    """
    logits_UV = label_logits(model, batch).float()
    log_normaliser_U = torch.logsumexp(logits_UV, dim=-1)
    losses_N = log_normaliser_U[batch.row] - logits_UV[batch.row, batch.label]
    if label_smoothing > 0:
        uniform_U = log_normaliser_U - logits_UV.mean(dim=-1)
        losses_N = torch.lerp(losses_N, uniform_U[batch.row], label_smoothing)
    return torch.zeros(batch.num_pairs, device=losses_N.device).index_add(0, batch.pair, losses_N)


def label_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Logits (U, V) at the batch's positions, and nowhere else."""
    inputs = dict(batch.inputs)
    if batch.encoder is not None:
        states = model.get_encoder()(**batch.encoder)[0]
        inputs["encoder_outputs"] = BaseModelOutput(last_hidden_state=states[batch.source_of_row])
        inputs["attention_mask"] = batch.encoder["attention_mask"][batch.source_of_row]
    with _head_at(model, batch.positions):
        logits: Tensor = model(**inputs).logits
    return logits.reshape(len(batch.positions), -1)


@contextmanager
def _head_at(model: PreTrainedModel, positions: Tensor) -> Iterator[None]:
    """The output head gets the hidden states of these positions only; scale, bias and cap go on as ever."""

    def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        return (args[0].reshape(-1, args[0].shape[-1])[positions],)

    head: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


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
