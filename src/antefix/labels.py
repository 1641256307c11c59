"""Labels for texts, from prefixes that were trained to label, or choices, from those that were trained to rank.

What `generate` is for those that write.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from antefix.at_work import BARE
from antefix.attach import current_attachment, indices_of_sources, rows_of_batch, rows_of_sources, told
from antefix.attachment import Attachment
from antefix.base import Base
from antefix.batches.batch import right_padded
from antefix.choices import choose_each
from antefix.data.example import Example, Source
from antefix.data.linearise import TextFormat
from antefix.errors import GenerationError
from antefix.hidden_states import states_and_logits
from antefix.methods.base import MethodModule
from antefix.parts.word_head import Head
from antefix.prefix import Prefix
from antefix.sites import find_sites
from antefix.tasks import LabelTask, RankingTask, Task, TextTask


def label(
    base: Base,
    sources: Sequence[Example | Source],
    *,
    task: Task | None = None,
    text_format: TextFormat | None = None,
    batch_size: int = 32,
) -> list[str]:
    """A label for every source (`classification`), its words' tags, separated by spaces (`tagging`), or the choice
    taken (`ranking`, for examples with choices).

    task, text_format: None takes them from the cards of what is attached. Rows may carry different prefixes; those that
    rank need one text format and one length_norm. Raises GenerationError where something is attached that labels
    nothing, for a row without a prefix, and for an empty list of sources.
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
    task: Task | None = None,
    text_format: TextFormat | None = None,
    batch_size: int = 32,
) -> Iterator[tuple[int, str]]:
    """`(index, labels)` as batches are done, longest sources first. See `label`."""
    tasks = _tasks_of(base, task)
    if not sources:
        raise GenerationError("nothing to label: the list of sources is empty")
    if len(ranking := [t for t in tasks if isinstance(t, RankingTask)]) == len(tasks):
        with_choices = [s for s in sources if isinstance(s, Example) and s.choices]
        if len(with_choices) < len(sources):
            raise GenerationError("what is attached ranks choices: give examples that have some")
        formats = _formats_of(base, text_format)
        if any(t != ranking[0] for t in ranking) or any(f != formats[0] for f in formats):
            raise GenerationError(
                "prefixes that rank with different text formats or length_norm are attached: attach one at a time"
            )
        yield from choose_each(base, with_choices, ranking[0], formats[0], batch_size)
        return
    for n, labels, scores in scores_each(base, sources, task=task, text_format=text_format, batch_size=batch_size):
        yield n, labels.text_of(scores.argmax(-1).tolist())


@torch.no_grad()
def scores_each(
    base: Base,
    sources: Sequence[Example | Source],
    *,
    task: Task | None = None,
    text_format: TextFormat | None = None,
    batch_size: int = 32,
) -> Iterator[tuple[int, LabelTask, Tensor]]:
    """`(index, its task, scores)` as batches are done; scores: (N, K), of K labels at N places. See `label`."""
    tasks = _tasks_of(base, task)
    labelling = [t for t in tasks if isinstance(t, LabelTask)]
    if len(labelling) < len(tasks):
        raise GenerationError("prefixes that label and others that rank are attached: they cannot share a batch")
    formats, attachment = _formats_of(base, text_format), _attachment(base)
    plain = [s.source if isinstance(s, Example) else s for s in sources]
    rows = rows_of_sources(base.model, len(plain))
    index = indices_of_sources(base.model, len(plain))
    if BARE in index:
        raise GenerationError(f"source {index.index(BARE) + 1} has no prefix that labels it: leave it out")
    for_encoder = not find_sites(base.model).is_causal
    encoders = {
        n: labelling[n].encoder(
            formats[n], base.tokenizer_with(attachment.module_of(n).symbols), for_encoder=for_encoder
        )
        for n in set(index)
    }
    encoded = [encoders[n](source) for source, n in zip(plain, index, strict=True)]
    rooms = [attachment.module_of(n).room_in(base.context_length) for n in index]
    _refuse_long([ids for ids, *_ in encoded], rooms)
    order = sorted(range(len(plain)), key=lambda n: -len(encoded[n][0]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        heads = [attachment.head_of(index[n]) for n in batch]
        with rows_of_batch(base.model, rows, batch):
            read = _read(base, heads, [encoded[n][0] for n in batch], [encoded[n][1] for n in batch])
        for n, head, states_or_logits in zip(batch, heads, read, strict=True):
            yield n, labelling[index[n]], head(states_or_logits)


def _read(base: Base, heads: Sequence[Head], ids: Sequence[list[int]], places: Sequence[Sequence[int]]) -> list[Tensor]:
    """What each text's head is given, a row for each of its places; texts are padded on the right."""
    padded, mask = (x.to(base.model.device) for x in right_padded(ids, base.tokenizer.pad_token_id))
    # What has words for its labels has one place.
    place_B = torch.tensor([places[b][0] if head.reads_logits else 0 for b, head in enumerate(heads)])
    with told(base.model, source_lengths=torch.tensor([len(row) for row in ids])):
        states, logits = states_and_logits(base.model, {"input_ids": padded, "attention_mask": mask}, place_B)
    return [logits[b : b + 1] if head.reads_logits else states[b, places[b]] for b, head in enumerate(heads)]


def _refuse_long(ids: Sequence[Sequence[int]], rooms: Sequence[int | None]) -> None:
    """rooms: how many tokens each source may have, where its prefix takes positions of the base's context."""
    for number, (row, room) in enumerate(zip(ids, rooms, strict=True), start=1):
        if room is not None and len(row) > room:
            raise GenerationError(
                f"source {number} has {len(row)} tokens, more than the base's context has room for ({room}); shorten it"
            )


def _attachment(base: Base) -> Attachment:
    attachment = current_attachment(base.model)
    if attachment is None:
        raise GenerationError("to label texts, attach a prefix that was trained to classify or to tag")
    return attachment


def _tasks_of(base: Base, task: Task | None) -> list[Task]:
    prefixes = _attachment(base).prefixes
    tasks: list[Task] = [task or (p.card.task if isinstance(p, Prefix) else TextTask()) for p in prefixes]
    if any(t.writes_text for t in tasks):
        raise GenerationError("to label texts, attach prefixes that were trained to classify, to tag or to rank")
    return tasks


def _formats_of(base: Base, text_format: TextFormat | None) -> list[TextFormat]:
    return [text_format or _format_of(prefix) for prefix in _attachment(base).prefixes]


def _format_of(prefix: Prefix | MethodModule) -> TextFormat:
    return TextFormat.from_dict(prefix.card.text_format) if isinstance(prefix, Prefix) else TextFormat()
