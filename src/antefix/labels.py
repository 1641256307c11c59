"""Labels for texts, from prefixes that were trained to label: what `generate` is for those that write."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from antefix.attach import current_attachment, rows_of_batch, rows_of_sources, told
from antefix.base import Base
from antefix.data.example import Example, Source
from antefix.data.linearise import TextFormat
from antefix.errors import GenerationError
from antefix.hidden_states import last_hidden_states
from antefix.methods.base import MethodModule
from antefix.prefix import Prefix
from antefix.sites import find_sites
from antefix.tasks import LabelTask


def label(
    base: Base,
    sources: Sequence[Example | Source],
    *,
    task: LabelTask | None = None,
    text_format: TextFormat | None = None,
    batch_size: int = 32,
) -> list[str]:
    """A label for every source (`classification`), or its words' tags, separated by spaces (`tagging`).

    task, text_format: None takes them from the cards of what is attached. Rows may carry different prefixes. Raises
    GenerationError where something is attached that labels nothing, and for an empty list of sources.
    """
    found = [""] * len(sources)
    for index, text in label_each(base, sources, task=task, text_format=text_format, batch_size=batch_size):
        found[index] = text
    return found


@torch.no_grad()
def label_each(
    base: Base,
    sources: Sequence[Example | Source],
    *,
    task: LabelTask | None = None,
    text_format: TextFormat | None = None,
    batch_size: int = 32,
) -> Iterator[tuple[int, str]]:
    """`(index, labels)` as batches are done, longest sources first. See `label`."""
    attachment = current_attachment(base.model)
    if attachment is None:
        raise GenerationError("to label texts, attach a prefix that was trained to classify or to tag")
    tasks = [task or _task_of(prefix) for prefix in attachment.prefixes]
    if not sources:
        raise GenerationError("nothing to label: the list of sources is empty")
    text_format = text_format or _format_of(attachment.prefixes[0])
    plain = [s.source if isinstance(s, Example) else s for s in sources]
    encoded = [_encoded(base, tasks[0], text_format, source) for source in plain]
    rows = rows_of_sources(base.model, len(plain))
    order = sorted(range(len(plain)), key=lambda n: -len(encoded[n][0]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        with rows_of_batch(base.model, rows, batch):
            states = _states(base, [encoded[n][0] for n in batch])
        for place, n in enumerate(batch):
            index = 0 if rows is None else int(rows[n])
            scores = attachment.head_of(index)(states[place, encoded[n][1]])
            yield n, tasks[index].text_of(scores.argmax(-1).tolist())


def _states(base: Base, ids: Sequence[list[int]]) -> Tensor:
    """Last hidden states of texts, padded on the right: (B, T, C)."""
    width, pad, device = max(map(len, ids)), base.tokenizer.pad_token_id, base.model.device
    inputs = {
        "input_ids": torch.tensor([row + [pad] * (width - len(row)) for row in ids], device=device),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids], device=device),
    }
    with told(base.model, source_lengths=torch.tensor([len(row) for row in ids])):
        return last_hidden_states(base.model, inputs)


def _encoded(base: Base, task: LabelTask, text_format: TextFormat, source: Source) -> tuple[list[int], list[int]]:
    return task.encode_source(source, text_format, base.tokenizer, for_encoder=not find_sites(base.model).is_causal)


def _task_of(prefix: Prefix | MethodModule) -> LabelTask:
    task = prefix.card.task if isinstance(prefix, Prefix) else None
    if task is None:
        raise GenerationError("to label texts, attach prefixes that were trained to classify or to tag")
    return task


def _format_of(prefix: Prefix | MethodModule) -> TextFormat:
    return TextFormat.from_dict(prefix.card.text_format) if isinstance(prefix, Prefix) else TextFormat()
