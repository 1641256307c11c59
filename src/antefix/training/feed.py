"""A data set on its way into the model: the form of batch that the base takes, and the batches themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from antefix.attachment import Attachment
from antefix.attention.forest import plant
from antefix.attention.hook import routed
from antefix.condition import read_condition
from antefix.data.encode import Encoded
from antefix.data.plan import Unit, microbatches
from antefix.errors import TrainingError
from antefix.methods.base import MethodModule
from antefix.parts.word_head import Head
from antefix.training.batch import Batch, encoder_decoder_batch, packed_batch, padded_batch
from antefix.training.kept_sources import KeptSources
from antefix.training.labelling import labelled_batch, labelled_losses
from antefix.training.objectives import pair_losses
from antefix.training.recipe import TrainingRecipe

BatchForm = Literal["packed", "padded", "encoder_decoder", "labels"]
_FORMS: dict[BatchForm, Callable[[Encoded, Sequence[Unit], PreTrainedModel], Batch]] = {
    "packed": packed_batch,
    "padded": padded_batch,
    "encoder_decoder": encoder_decoder_batch,
    "labels": labelled_batch,
}


@dataclass(frozen=True)
class Feed:
    """A data set and how it is fed."""

    model: PreTrainedModel
    data: Encoded
    form: BatchForm
    tokens_per_batch: int
    condition_length: int | None = None
    """The most tokens of a second text; None: none is read."""
    label_head: Head | None = None
    """What reads labels off hidden states; None: the base's own head writes texts."""
    kept: KeptSources | None = None
    """The sources, where they are read once and not fed."""

    @property
    def _fed(self) -> Encoded:
        return self.data if self.kept is None else self.kept.rest

    def parts(self, units: Sequence[Unit], multiple_of: int = 1) -> list[list[Unit]]:
        """Units in batches within the token budget; see `microbatches`."""
        return microbatches(
            self._fed, units, self.tokens_per_batch, packed=self.form != "padded", multiple_of=multiple_of
        )

    def losses(self, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        """The summed loss of every pair, (M,), float32."""
        if self.label_head is not None:
            return labelled_losses(self.model, self.label_head, batch, label_smoothing)
        return pair_losses(self.model, batch, label_smoothing)

    def batch(self, units: Sequence[Unit]) -> Batch:
        """What the model takes, on its device."""
        batch = _to(_FORMS[self.form](self._fed, units, self.model), self.model.device)
        if self.condition_length is not None:
            texts = [self.data.examples[u.example].condition for u in units]
            batch = replace(batch, condition=read_condition(self.model, texts, self.condition_length))
        if self.kept is not None:
            before, masks = self.kept.before(units), batch.inputs["attention_mask"]
            for mask in masks.values() if isinstance(masks, dict) else [masks]:
                plant(mask, before)
        return batch


def feed_of(
    model: PreTrainedModel, module: MethodModule, attachment: Attachment, data: Encoded, form: BatchForm,
    recipe: TrainingRecipe,
) -> Feed:  # fmt: skip
    """A data set as a recipe has it fed. Raises TrainingError where its sources cannot be kept."""
    feed = Feed(model, data, form, recipe.tokens_per_batch, attachment.condition_length, module.head)
    if not recipe.keep_source_states:
        return feed
    if not module.leaves_sources:
        raise TrainingError(
            "keep_source_states: sources are read anew in every step where they see what is learned; leave it out, or "
            "take a method whose slots targets alone see (infix)"
        )
    if form != "packed":
        raise TrainingError(f"keep_source_states: this base takes no packed rows ({form}); leave it out")
    return replace(feed, kept=KeptSources(model, attachment, data, recipe.tokens_per_batch))


def batch_form(model: PreTrainedModel, data: Encoded, packed: bool | None, *, labels: bool = False) -> BatchForm:
    """Which form of batch the base takes; asked of the base itself, on one source of the data.

    labels: whether texts are labelled, not written; their rows are padded. Raises TrainingError if packed rows were
    asked for and the base gives other losses with them.
    """
    if labels:
        return "labels"
    if model.config.is_encoder_decoder:
        return "encoder_decoder"
    if packed is False:
        return "padded"
    unit = _probe_unit(data)
    with torch.no_grad(), routed(model):
        try:
            together, apart = (
                pair_losses(model, _to(make(data, [unit], model), model.device))
                for make in (packed_batch, padded_batch)
            )
            equal = torch.allclose(together, apart, rtol=2e-2 if model.dtype != torch.float32 else 1e-4, atol=1e-4)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError):  # an attention that such a mask does not fit
            equal = False
    if not equal and packed:
        raise TrainingError("packed = true, but this base's attention cannot take packed rows: leave `packed` out")
    return "packed" if equal else "padded"


def _probe_unit(data: Encoded) -> Unit:
    """Two targets of one source, of the longest: a window must be at work where there is one."""

    def size(n: int) -> tuple[int, int]:
        example = data.examples[n]
        return min(len(example.targets), 2), len(example.source) + sum(len(t) for t in example.targets[:2])

    chosen = max(range(len(data.examples)), key=size)
    return Unit(chosen, tuple(range(min(len(data.examples[chosen].targets), 2))))


def _to(batch: Batch, device: torch.device) -> Batch:
    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        return {k: move(v) for k, v in value.items()} if isinstance(value, dict) else value

    fields = ("inputs", "positions", "row", "label", "pair", "encoder", "source_of_row", "source_lengths", "weight")
    return replace(batch, **{name: move(getattr(batch, name)) for name in fields})
