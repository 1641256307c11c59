"""Which of its choices each example takes: the one that the base, with what is attached to it, finds likeliest.

The score of a choice y of T tokens, its end token among them, is (sum_t log p(y_t | x, y_<t)) / T^length_norm: rank
classification as T-Few has it (Liu et al. 2022, arXiv 2205.05638, section 3.1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from antefix.attach import current_attachment, indices_of_sources, rows_of_batch, rows_of_sources
from antefix.attention.hook import routed
from antefix.base import Base
from antefix.batches.choices import choice_scores
from antefix.batches.form import batch_form, batch_of
from antefix.batches.head import label_losses
from antefix.condition import read_condition
from antefix.data.encode import Encoded, EncodedExample, Limits
from antefix.data.example import Example
from antefix.data.linearise import TextFormat
from antefix.data.plan import Unit
from antefix.tasks import RankingTask


@torch.no_grad()
def choose_each(
    base: Base, examples: Sequence[Example], task: RankingTask, text_format: TextFormat, batch_size: int = 16
) -> Iterator[tuple[int, str]]:
    """`(index, the choice taken)` as batches are done, longest sources first. Rows may carry different prefixes.

    Raises DataError for examples without choices, and GenerationError for rows of another number.
    """
    rows = rows_of_sources(base.model, len(examples))
    encoded = _encoded(base, examples, task, text_format)
    attachment = current_attachment(base.model)
    condition_length = None if attachment is None else attachment.condition_length
    with rows_of_batch(base.model, rows, [0]):  # of one source: which form a base takes depends on no prefix
        form = batch_form(base.model, encoded, None)
    order = sorted(range(len(examples)), key=lambda n: -len(encoded.examples[n].source))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        units = [Unit(n, tuple(range(len(examples[n].choices)))) for n in indices]
        with rows_of_batch(base.model, rows, indices), routed(base.model):
            batch = batch_of(form, encoded, units, base.model)
            if condition_length is not None:
                texts = [encoded.examples[n].condition for n in indices]
                batch = replace(batch, condition=read_condition(base.model, texts, condition_length))
            losses_N = label_losses(base.model, batch)
        assert batch.choices is not None
        taken = choice_scores(losses_N, batch.pair, batch.choices, task.length_norm).argmax(dim=1)
        for n, place in zip(indices, taken.tolist(), strict=True):
            yield n, examples[n].choices[place]


def _encoded(base: Base, examples: Sequence[Example], task: RankingTask, text_format: TextFormat) -> Encoded:
    """All examples, each with what its prefix asks for: tokens after the source, a second text."""
    attachment = current_attachment(base.model)
    for_encoder = bool(base.model.config.is_encoder_decoder)
    every: list[EncodedExample] = []
    for example, n in zip(examples, indices_of_sources(base.model, len(examples)), strict=True):
        limits, tokenizer = Limits(context=base.context_length), base.tokenizer
        if attachment is not None:
            module = attachment.module_of(n)
            limits = module.limits_in(base.context_length)
            tokenizer = base.tokenizer_with(module.symbols)
        every += task.encode([example], text_format, tokenizer, limits, for_encoder=for_encoder).examples
    return Encoded(tuple(every), 0, 0, for_encoder, are_choices=True)
