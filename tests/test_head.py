"""Losses through a frozen head, few rows at a time and with no logits kept, are those of logits that are all there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import DECODER_ONLY, ENCODER_DECODER, VOCABULARY, tiny_model
from test_packing import encoded
from torch import Tensor, nn
from transformers import PreTrainedModel

from antefix.batches import head
from antefix.batches.batch import Batch, encoder_decoder_batch, padded_batch
from antefix.batches.head import label_logits, label_losses, losses_of_logits
from antefix.data.plan import all_units
from antefix.products import product


def batch_for(model: PreTrainedModel) -> Batch:
    """More scored positions than are computed at once, several labels at some."""
    is_encoder_decoder = bool(model.config.is_encoder_decoder)
    data = encoded((7, (100, 1, 100)), (3, (125,)))
    make = encoder_decoder_batch if is_encoder_decoder else padded_batch
    return make(data, all_units(data, 4), model)


def with_gradient(losses_N: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.linspace(-0.5, 1.5, len(losses_N))
    (gradient,) = torch.autograd.grad((losses_N * weights).sum(), inputs)
    return losses_N.detach(), gradient


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("name", [*DECODER_ONLY, *ENCODER_DECODER])
def test_losses_and_gradients_are_those_of_all_logits(name: str, label_smoothing: float) -> None:
    model = tiny_model(name).requires_grad_(False)
    batch = batch_for(model)
    assert len(batch.positions) > head._ROWS_AT_ONCE
    # The first layer's norm, far from the head: what flows back through the whole model.
    learned = next(p for n, p in model.named_parameters() if "norm" in n or "ln_1" in n).requires_grad_(True)
    few, all_at_once = (
        with_gradient(losses, learned)
        for losses in (
            label_losses(model, batch, label_smoothing),
            losses_of_logits(label_logits(model, batch), batch.row, batch.label, label_smoothing),
        )
    )
    for ours, theirs in zip(few, all_at_once, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * max(1.0, float(theirs.abs().max())))
    assert all_at_once[1].abs().max() > 1e-3, "nothing would be compared"
    assert (model in head._do_more) == (name == "gemma2"), "only Gemma 2 caps its logits"


@pytest.mark.parametrize("multiply", [nn.functional.linear, product])
def test_several_labels_at_one_position(multiply: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 5, requires_grad=True), torch.randn(VOCABULARY, 5)
    row, label = torch.tensor([2, 0, 2, 2]), torch.tensor([7, 7, 1, 7])
    losses = head._FrozenHead.apply(hidden, weight, None, row, label, 0.0, multiply)  # type: ignore[no-untyped-call]
    ours = with_gradient(losses, hidden)
    theirs = with_gradient(nn.functional.cross_entropy((hidden @ weight.T)[row], label, reduction="none"), hidden)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert ours[1][1].abs().max() == 0, "no label, no gradient"


def test_a_head_that_is_trained_gets_its_gradient() -> None:
    model = tiny_model("gpt_neox").requires_grad_(False)
    weight = model.get_output_embeddings().weight.requires_grad_(True)
    label_losses(model, batch_for(model)).sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().max() > 0


def test_a_bias_that_is_trained_gets_its_gradient() -> None:
    model = tiny_model("llama").requires_grad_(False)
    head = nn.Linear(model.config.hidden_size, VOCABULARY)
    head.weight.requires_grad_(False)
    model.set_output_embeddings(head)
    label_losses(model, batch_for(model)).sum().backward()
    assert head.bias.grad is not None
    assert head.bias.grad.abs().max() > 0


def test_a_head_whose_output_is_changed_is_found_out() -> None:
    model = tiny_model("llama").requires_grad_(False)
    batch = batch_for(model)
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: output / 3)
    losses = label_losses(model, batch)
    torch.testing.assert_close(losses, losses_of_logits(label_logits(model, batch), batch.row, batch.label))


def test_a_base_that_scales_its_logits_is_found_out() -> None:
    """By looking at one row: the model's logits are not its head's output."""
    model = tiny_model("llama").requires_grad_(False)
    batch = batch_for(model)
    plain = label_losses(model, batch)
    model.register_forward_hook(lambda module, args, output: output.__class__(logits=output.logits / 3))
    scaled = label_losses(model, batch)
    torch.testing.assert_close(scaled, losses_of_logits(label_logits(model, batch), batch.row, batch.label))
    assert (scaled - plain).abs().max() > 0.1


def test_half_precision() -> None:
    model = tiny_model("llama", torch.bfloat16).requires_grad_(False)
    batch = batch_for(model)
    logits = label_logits(model, batch).float()
    torch.testing.assert_close(
        label_losses(model, batch), losses_of_logits(logits, batch.row, batch.label), rtol=1e-3, atol=1e-3
    )
