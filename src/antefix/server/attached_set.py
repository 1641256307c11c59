"""The prefixes that are attached to the base while a batch runs.

Attaching takes longer than a token, so it is done anew only when a prefix joins that is not attached. What is attached
beside the prefixes at work are those that were lately: they may come back, and cost next to nothing meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from antefix.attachment import Attachment
from antefix.server.carried import Carried
from antefix.site_stack import RowMemory

_MOST_IDLE = 8


class AttachedSet:
    """What is attached to a base's model; one at a time."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._every: list[Carried] = []  # the latest that joined last
        self._attachment: Attachment | None = None
        self._rows: list[int] | None = None

    def include(self, joining: Sequence[Carried], at_work: Sequence[Carried]) -> None:
        """Have these attached. What is attached stays so where an error is raised (PrefixError or another)."""
        wanted = dict.fromkeys([*at_work, *joining])
        if all(one in self._every for one in wanted):
            return
        idle = [one for one in self._every if one not in wanted and not one.is_dropped]
        every = [*idle[-_MOST_IDLE:], *wanted]
        modules = [one.module for one in every]
        attachment = Attachment(self._model, modules, modules)
        before = self._attachment
        if before is not None:
            before.detach()
        try:
            attachment.begin()
        except Exception:
            if before is not None:  # rows at work would go on without their prefixes, and nobody would notice
                before.begin()
            raise
        self._every, self._attachment, self._rows = every, attachment, None

    def place(self, rows: Sequence[Carried | None], source_columns: int | Tensor) -> None:
        """The next pass has these rows, whose sources end in these columns."""
        if self._attachment is None:
            return
        indices = [-1 if one is None else self._every.index(one) for one in rows]
        if indices != self._rows:  # else what was gathered for these rows still stands
            self._attachment.rows = indices
            self._rows = indices
        self._attachment.source_lengths = torch.as_tensor(source_columns)

    def memory_of(self, row: int, carried: Carried | None) -> RowMemory:
        """What is kept of the text in a row of the last pass."""
        if self._attachment is None or carried is None:
            return {}
        index = self._every.index(carried)
        return {key: kept for site in self._attachment.at_sites for key, kept in site.memory_of_row(row, index).items()}

    def put_memories(self, memories: Sequence[RowMemory]) -> None:
        """The next pass goes on with these texts, in the rows' order."""
        if self._attachment is None or self._rows is None or not any(memories):
            return
        for site in self._attachment.at_sites:
            site.put_memories(list(zip(self._rows, memories, strict=True)))

    def release(self) -> None:
        """Attach nothing."""
        if self._attachment is not None:
            self._attachment.detach()
        self._every, self._attachment, self._rows = [], None, None
