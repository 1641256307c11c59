"""Prefixes + base -> an attached base: an ordinary transformers model whose rows carry prefixes.

    with attached(model, prefix):                         # every row carries the prefix
        model.generate(**batch)
    with attached(model, menus, sport) as attachment:
        attachment.rows = [0, 1, -1]                      # each row its own, the third none; beams expand it
        model(**batch)

No method of the model is replaced. While a *trainable* prefix is attached it stands in the model as the
submodule `antefix`, so that any training loop finds its parameters. After detaching the base is bit-equal to
what it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel

from antefix.at_work import BARE
from antefix.attachment import Attachment, attachments
from antefix.attention.branch import Condition
from antefix.errors import GenerationError
from antefix.methods.base import MethodModule
from antefix.prefix import Prefix


def attach(
    model: PreTrainedModel, *prefixes: Prefix | MethodModule, rows: Sequence[int] | Tensor | None = None
) -> Attachment:
    """Attach prefixes to a base's model until `.detach()` is called.

    A second attach takes over from the first until it is detached. Raises WrongBaseError for a prefix of
    another base, PrefixError for one that does not fit, and BaseModelError for a base that can carry none.
    """
    modules = [p.module(model) if isinstance(p, Prefix) else p for p in prefixes]
    attachment = Attachment(model, modules, prefixes)
    attachment.rows = rows
    attachment.begin()
    return attachment


@contextmanager
def attached(
    model: PreTrainedModel, *prefixes: Prefix | MethodModule, rows: Sequence[int] | Tensor | None = None
) -> Iterator[Attachment]:
    """`attach` for the length of a block, exceptions included."""
    attachment = attach(model, *prefixes, rows=rows)
    try:
        yield attachment
    finally:
        attachment.detach()


def current_attachment(model: nn.Module) -> Attachment | None:
    """What is attached to a model right now."""
    stack = attachments(model)
    return stack[-1] if stack else None


@contextmanager
def told(
    model: nn.Module, *, source_lengths: int | Tensor | None = None, condition: Condition | None = None
) -> Iterator[None]:
    """For the length of a block what is attached to a model knows where the sources end, and their second texts.

    None: unknown inside the block, whatever was said before.
    """
    attachment = current_attachment(model)
    if attachment is None:
        yield
        return
    before = attachment.source_lengths, attachment.condition
    attachment.source_lengths, attachment.condition = source_lengths, condition
    try:
        yield
    finally:
        attachment.source_lengths, attachment.condition = before


def rows_of_sources(model: nn.Module, num_sources: int) -> Tensor | None:
    """Which prefix each of so many sources carries, where `attachment.rows` says it of them; None: it says nothing.

    Raises GenerationError where it speaks of another number of sources.
    """
    attachment = current_attachment(model)
    if attachment is None or attachment.rows is None:
        return None
    if len(attachment.rows) != num_sources:
        raise GenerationError(f"{num_sources} sources, but attachment.rows has {len(attachment.rows)} entries")
    return attachment.rows


def indices_of_sources(model: nn.Module, num_sources: int) -> list[int]:
    """The index of the prefix that each of so many sources carries, -1 for none. Raises as `rows_of_sources` does."""
    if current_attachment(model) is None:
        return [BARE] * num_sources
    rows = rows_of_sources(model, num_sources)
    return [0] * num_sources if rows is None else rows.tolist()


@contextmanager
def rows_of_batch(model: nn.Module, rows: Tensor | None, batch: Sequence[int]) -> Iterator[None]:
    """For the length of a block `attachment.rows` speaks of these sources alone."""
    attachment = current_attachment(model)
    if attachment is None or rows is None:
        yield
        return
    attachment.rows = rows[list(batch)]
    try:
        yield
    finally:
        attachment.rows = rows
