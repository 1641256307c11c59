"""Which form of batch a base takes, found by asking it, and batches of that form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from antefix.attention.hook import routed
from antefix.batches.batch import Batch, Choices, NoForestError, encoder_decoder_batch, packed_batch, padded_batch
from antefix.batches.head import pair_losses
from antefix.batches.labelled import labelled_batch
from antefix.data.encode import Encoded
from antefix.data.plan import Unit
from antefix.errors import TrainingError

BatchForm = Literal["packed", "padded", "encoder_decoder", "labels"]
_FORMS: dict[BatchForm, Callable[[Encoded, Sequence[Unit], PreTrainedModel], Batch]] = {
    "packed": packed_batch,
    "padded": padded_batch,
    "encoder_decoder": encoder_decoder_batch,
    "labels": labelled_batch,
}


def batch_of(form: BatchForm, encoded: Encoded, units: Sequence[Unit], model: PreTrainedModel) -> Batch:
    """What the model takes, on its device."""
    batch = _FORMS[form](encoded, units, model)
    if encoded.are_choices:
        batch = replace(batch, choices=Choices.of(encoded, units))
    return _to(batch, model.device)


def batch_form(model: PreTrainedModel, data: Encoded, packed: bool | None, *, labels: bool = False) -> BatchForm:
    """Which form of batch the base takes; asked of the base itself, on one source of the data.

    packed: None packs on the processor alone. On an accelerator the many small steps that packed rows take apart into
    cost more than the tokens that they save (`docs/experiments.md`). labels: whether texts are labelled, not written;
    their rows are padded. Raises TrainingError if packed rows were asked for and the base gives other losses with them.
    """
    if labels:
        return "labels"
    if model.config.is_encoder_decoder:
        return "encoder_decoder"
    if packed is False or (packed is None and model.device.type != "cpu"):
        return "padded"
    takes_packed = _takes_packed(model, data)
    if not takes_packed and packed:
        raise TrainingError("packed = true, but this base's attention cannot take packed rows: leave `packed` out")
    return "packed" if takes_packed else "padded"


def _takes_packed(model: PreTrainedModel, data: Encoded) -> bool:
    """Whether a packed row gives the losses of padded ones."""
    units = [_probe_unit(data)]
    padded = batch_of("padded", data, units, model)
    try:
        packed = batch_of("packed", data, units, model)
    except NoForestError:
        return False
    with torch.no_grad(), routed(model):
        apart = pair_losses(model, padded)
        try:
            together = pair_losses(model, packed)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError):  # an attention that such a mask does not fit
            return False
    return torch.allclose(together, apart, rtol=2e-2 if model.dtype != torch.float32 else 1e-4, atol=1e-4)


def _probe_unit(data: Encoded) -> Unit:
    """Two targets of one source, of the longest: a window must be at work where there is one. Choices all together."""

    def targets(n: int) -> int:
        count = len(data.examples[n].targets)
        return count if data.are_choices else min(count, 2)

    def size(n: int) -> tuple[int, int]:
        example = data.examples[n]
        return targets(n), len(example.source) + sum(len(t) for t in example.targets[: targets(n)])

    chosen = max(range(len(data.examples)), key=size)
    return Unit(chosen, tuple(range(targets(chosen))))


def _to(batch: Batch, device: torch.device) -> Batch:
    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        if isinstance(value, tuple):  # named ones, of tensors
            return type(value)(*map(move, value))
        return {k: move(v) for k, v in value.items()} if isinstance(value, dict) else value

    return replace(batch, **{field.name: move(getattr(batch, field.name)) for field in fields(batch)})
