"""The output head: losses of labels, with logits at label positions only.

Logits are the largest thing in a training step: a row of them is as wide as the vocabulary. `label_losses` makes them
for a few rows at a time and keeps none. What the backward pass needs of them is a row as wide as a hidden state, since
the head is frozen: with p the softmax of a row's logits and W the head's weights, the gradient of the log of the
normaliser is p W, whatever the row's losses are weighed with later.

`label_logits` is the slow twin, for heads that do more than multiply: caps, scales, adapters, trained weights.

Axes: U scored positions, N labels, V words, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from antefix.attach import current_attachment, rows_of_batch, rows_of_sources, told
from antefix.batches.batch import Batch
from antefix.hooks import while_hooked
from antefix.products import FrozenLinear, product, takes_onednn

_ROWS_AT_ONCE = 256
_do_more: WeakSet[PreTrainedModel] = WeakSet()
"""Models whose logits are not their head's output, found by looking."""


def label_losses(model: PreTrainedModel, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
    """The negative log-likelihood of every label, shape (N,), float32.

    label_smoothing e: (1 - e) times the label's share plus e times the mean over the vocabulary.
    """
    head: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    attachment = current_attachment(model)
    more_words = attachment is not None and attachment.has_new_tokens
    if _only_multiplies(head) and model not in _do_more and not more_words:
        hidden_UH, first_logits = _hidden_states(model, head, batch)
        multiply: Callable[..., Tensor] = product if takes_onednn(head, hidden_UH) else nn.functional.linear
        with torch.no_grad():
            as_multiplied = multiply(hidden_UH[:1], head.weight, head.bias)
        if torch.equal(first_logits, as_multiplied.float()):
            return _FrozenHead.apply(  # type: ignore[no-untyped-call,no-any-return]
                hidden_UH, head.weight, head.bias, batch.row, batch.label, label_smoothing, multiply
            )
        _do_more.add(model)
    return losses_of_logits(label_logits(model, batch).float(), batch.row, batch.label, label_smoothing)


def pair_losses(model: PreTrainedModel, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
    """The summed negative log-likelihood of every pair's target, shape (M,), float32.

    label_smoothing e: (1 - e) times the label's share plus e times the mean over the vocabulary.
    """
    losses_N = label_losses(model, batch, label_smoothing)
    if batch.weight is not None:
        losses_N = losses_N * batch.weight
    return torch.zeros(batch.num_pairs, device=losses_N.device).index_add(0, batch.pair, losses_N)


def losses_of_logits(logits_UV: Tensor, row_N: Tensor, label_N: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The same from logits that are there."""
    log_normaliser_U = torch.logsumexp(logits_UV, dim=-1)
    losses_N = log_normaliser_U[row_N] - logits_UV[row_N, label_N]
    if label_smoothing > 0:
        uniform_U = log_normaliser_U - logits_UV.mean(dim=-1)
        losses_N = torch.lerp(losses_N, uniform_U[row_N], label_smoothing)
    return losses_N


def label_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Logits (U, V) at the batch's positions, and nowhere else."""
    head: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    with _input_of(head, lambda states: states.reshape(-1, states.shape[-1])[batch.positions]):
        logits: Tensor = _forward(model, batch)
    return logits.reshape(len(batch.positions), -1)


def _only_multiplies(head: nn.Module) -> bool:
    if type(head) not in (nn.Linear, FrozenLinear) or type(head.weight) is not nn.Parameter:
        return False
    return not any(parameter.requires_grad for parameter in head.parameters())


def _hidden_states(model: PreTrainedModel, head: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """What the head gets at the batch's positions (U, H), and what the model makes of the first of them (1, V).

    The head itself gets that row alone.
    """
    kept: list[Tensor] = []

    def first_row(states: Tensor) -> Tensor:
        kept.append(states.reshape(-1, states.shape[-1])[batch.positions])
        return kept[0][:1]

    with _input_of(head, first_row):
        logits = _forward(model, batch)
    return kept[0], logits.reshape(1, -1).detach().float()


def _forward(model: PreTrainedModel, batch: Batch) -> Tensor:
    """`attachment.rows` speaks of a batch's sources; a row of a target carries what its source does."""
    inputs = dict(batch.inputs)
    if batch.encoder is not None:
        with told(model, condition=batch.condition):
            states = model.get_encoder()(**batch.encoder)[0]
        inputs["encoder_outputs"] = BaseModelOutput(last_hidden_state=states[batch.source_of_row])
        inputs["attention_mask"] = batch.encoder["attention_mask"][batch.source_of_row]
    with told(model, source_lengths=batch.source_lengths), _rows_of_targets(model, batch):
        return model(**inputs).logits  # type: ignore[no-any-return]


@contextmanager
def _rows_of_targets(model: PreTrainedModel, batch: Batch) -> Iterator[None]:
    attachment = current_attachment(model)
    if batch.source_of_row is None or attachment is None or attachment.rows is None:
        yield
        return
    sources = batch.source_of_row.tolist()
    with rows_of_batch(model, rows_of_sources(model, len(set(sources))), sources):
        yield


@contextmanager
def _input_of(head: nn.Module, select: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The head gets what is selected of its input; scale, bias and cap go on as ever."""
    with while_hooked([head.register_forward_pre_hook(lambda module, args: (select(args[0]),))]):
        yield


class _FrozenHead(torch.autograd.Function):
    """Losses of labels through a head that is not trained; logits are gone before the next rows' are made."""

    @staticmethod
    def forward(
        ctx: Any, hidden_UH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, row_N: Tensor, label_N: Tensor,
        label_smoothing: float, multiply: Callable[..., Tensor],
    ) -> Tensor:  # fmt: skip
        order = torch.argsort(row_N)
        starts = torch.searchsorted(
            row_N[order], torch.arange(0, len(hidden_UH) + _ROWS_AT_ONCE, _ROWS_AT_ONCE, device=row_N.device)
        )
        losses_N = torch.empty(len(row_N), device=hidden_UH.device)
        gradient_UH = torch.empty_like(hidden_UH, dtype=torch.float32)
        for n, first in enumerate(range(0, len(hidden_UH), _ROWS_AT_ONCE)):
            rows = slice(first, first + _ROWS_AT_ONCE)
            logits_UV = multiply(hidden_UH[rows], weight_VH, bias_V).float()
            labels = order[starts[n] : starts[n + 1]]
            losses_N[labels] = -logits_UV[row_N[labels] - first, label_N[labels]]
            mean_U = logits_UV.mean(dim=-1) if label_smoothing > 0 else None
            largest_U1 = logits_UV.amax(dim=-1, keepdim=True)
            share_UV = logits_UV.sub_(largest_U1).exp_()
            sum_U1 = share_UV.sum(dim=-1, keepdim=True)
            log_normaliser_U = (largest_U1 + sum_U1.log()).squeeze(1)
            losses_N[labels] += log_normaliser_U[row_N[labels] - first]
            if mean_U is not None:
                uniform_N = (log_normaliser_U - mean_U)[row_N[labels] - first]
                losses_N[labels] = torch.lerp(losses_N[labels], uniform_N, label_smoothing)
            if ctx.needs_input_grad[0]:
                gradient_UH[rows] = multiply(share_UV.to(weight_VH.dtype), weight_VH.t()).float() / sum_U1
        ctx.label_smoothing = label_smoothing
        ctx.save_for_backward(gradient_UH, weight_VH, row_N, label_N)
        ctx.dtype = hidden_UH.dtype
        return losses_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        of_normaliser_UH, weight_VH, row_N, label_N = ctx.saved_tensors
        e = ctx.label_smoothing
        weight_U1 = torch.zeros(len(of_normaliser_UH), 1, device=grad_N.device).index_add(0, row_N, grad_N[:, None])
        grad_UH = of_normaliser_UH * weight_U1
        grad_UH.index_add_(0, row_N, (e - 1) * grad_N[:, None] * weight_VH[label_N].float())
        if e > 0:
            grad_UH -= e * weight_U1 * weight_VH.float().mean(dim=0)
        return grad_UH.to(ctx.dtype), None, None, None, None, None, None
