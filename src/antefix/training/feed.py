"""A data set on its way into the model: the form of batch that the base takes, and the batches themselves.

Axes: E examples, K choices of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from antefix.attachment import Attachment
from antefix.attention.forest import plant
from antefix.batches.batch import Batch
from antefix.batches.choices import choice_scores
from antefix.batches.form import BatchForm, batch_of
from antefix.batches.head import label_losses, pair_losses
from antefix.batches.labelled import labelled_losses
from antefix.condition import read_condition
from antefix.data.encode import Encoded
from antefix.data.plan import Unit, microbatches
from antefix.errors import TrainingError
from antefix.methods.base import MethodModule
from antefix.parts.word_head import Head
from antefix.training.kept_sources import KeptSources
from antefix.training.objectives import StepSize, reduce_losses
from antefix.training.ranking import ranking_loss
from antefix.training.recipe import TrainingRecipe


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
    length_norm: float = 1.0
    """A choice's log-likelihood is divided by its length to this power in the dev loss, as it is in choosing."""
    kept: KeptSources | None = None
    """The sources, where they are read once and not fed."""

    @property
    def _fed(self) -> Encoded:
        return self.data if self.kept is None else self.kept.rest

    def parts(self, units: Sequence[Unit], multiple_of: int = 1) -> list[list[Unit]]:
        """Units in batches within the token budget; see `microbatches`."""
        packed = self.form == "packed"
        return microbatches(self._fed, units, self.tokens_per_batch, packed=packed, multiple_of=multiple_of)

    def step_loss(self, batch: Batch, size: StepSize, recipe: TrainingRecipe) -> Tensor:
        """What a batch adds to the loss of a step of this size."""
        if batch.choices is not None:
            return ranking_loss(label_losses(self.model, batch), batch.pair, batch.choices, size, recipe.ranking)
        return reduce_losses(self.losses(batch, recipe.label_smoothing), size, recipe.loss_reduction)

    def row_losses(self, batch: Batch) -> Tensor:
        """What each pair, or each example with choices, adds to the mean loss, before it is divided by `loss_count`."""
        if batch.choices is None:
            return self.losses(batch)
        scores_EK = choice_scores(label_losses(self.model, batch), batch.pair, batch.choices, self.length_norm)
        return torch.nn.functional.cross_entropy(scores_EK.double(), batch.choices.right_E, reduction="none")

    @property
    def loss_count(self) -> int:
        """What the mean loss of the data is a mean over: target tokens, labels, or examples with choices."""
        if self.data.are_choices:
            return self.data.num_pairs
        return sum(len(target) for example in self.data.examples for target in example.targets)

    def losses(self, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        """The summed loss of every pair, (M,), float32."""
        if self.label_head is not None:
            return labelled_losses(self.model, self.label_head, batch, label_smoothing)
        return pair_losses(self.model, batch, label_smoothing)

    def batch(self, units: Sequence[Unit]) -> Batch:
        """What the model takes, on its device."""
        batch = batch_of(self.form, self._fed, units, self.model)
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
    feed = Feed(
        model, data, form, recipe.tokens_per_batch, attachment.condition_length, module.head, recipe.ranking.length_norm
    )
    if not recipe.keep_source_states:
        return feed
    if not module.leaves_sources:
        raise TrainingError(
            "keep_source_states: sources are read anew in every step where they see what is learned; leave it out, or "
            "take a method whose slots targets alone see (infix)"
        )
    if form != "packed":
        raise TrainingError(
            f"keep_source_states: it needs packed rows, these are {form}; set packed = true, or leave it out"
        )
    return replace(feed, kept=KeptSources(model, attachment, data, recipe.tokens_per_batch))
