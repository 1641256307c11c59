"""Continuous batching: jobs join a running batch and leave it, each with its own prefix, length and sampling.

One `step` reads the prompts of those that join, as many as fit into a budget, and then writes one token for every row.
Knows token ids and prefixes in memory; nothing of texts, processes or requests' formats. Prefixes never enter the
cache: every row tells the attachment which one it carries.

Axes: T columns of a prompt, V words of the base.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from antefix.base import Base
from antefix.errors import AntefixError, ServingError, ServingKind, one_line
from antefix.server.attached_set import AttachedSet
from antefix.server.carried import Carried
from antefix.server.frame import Frame, buffer_columns, column_bytes, left_padded, mask_of, refuse_unfit
from antefix.server.messages import Event, Failed, Finished, Job, PromptScored, Token, Top
from antefix.server.residency import Residency
from antefix.server.sampling import Sampler, scores_of
from antefix.site_stack import RowMemory

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Row:
    """A job at work."""

    job: Job
    taken: tuple[Carried, ...]
    carried: Carried | None
    stop_ids: frozenset[int]
    ids: list[int]
    """What is read of it first: the prompt, and soft tokens after it."""
    sampler: Sampler
    length: int = 0
    """Its columns of the cache."""
    last_id: int = 0
    """The token that is written and not yet read."""
    num_written: int = 0
    memory: RowMemory = field(default_factory=dict)

    @property
    def wants_scores(self) -> bool:
        """Of its prompt."""
        return self.job.sampling.prompt_logprobs


@dataclass(eq=False)
class _Reading:
    """A long prompt that is read piece by piece."""

    row: _Row
    cache: DynamicCache = field(default_factory=DynamicCache)
    num_read: int = 0
    logprobs: list[float | None] = field(default_factory=lambda: [None])
    top: list[Top] = field(default_factory=lambda: [()])


class Loop:
    """A base, its running batch and those that wait. Not for several threads."""

    def __init__(
        self, base: Base, residency: Residency, *, max_rows: int, prompt_tokens: int, cache_bytes: int
    ) -> None:
        """Raises ServingError for a base that does not write texts from left to right, or is no plain attention."""
        refuse_unfit(base)
        self._base, self._residency = base, residency
        self._max_rows, self._prompt_tokens = max_rows, prompt_tokens
        self._attached = AttachedSet(base.model)
        self._column_bytes, self._cache_bytes = column_bytes(base.model), cache_bytes
        self._frame = Frame()
        self._rows: list[_Row] = []
        self._joining: list[_Row] = []  # whose prompts are read in this step
        self._reading: _Reading | None = None
        self._waiting: deque[Job] = deque()
        self._num_words = int(base.model.get_input_embeddings().weight.shape[0])  # type: ignore[index]

    @property
    def num_waiting(self) -> int:
        """Jobs that have no row yet."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Rows at work, one whose prompt is being read included."""
        return len(self._rows) + (self._reading is not None)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.num_running and not self._waiting

    def add(self, job: Job) -> None:
        """Let a job wait for a row."""
        self._waiting.append(job)

    def cancel(self, job_id: str) -> list[Event]:
        """Forget a job, wherever it is; its row is free at once."""
        for job in self._waiting:
            if job.id == job_id:
                self._waiting.remove(job)
                return [Finished(job_id, "cancelled")]
        for row in self._every_row():
            if row.job.id == job_id:
                self._leave(row)
                return [Finished(job_id, "cancelled", _num_slots(row))]
        return []

    def close(self) -> None:
        """Forget every job, without a word, and leave the base as it was: nothing is attached."""
        self._waiting.clear()
        self._forget_rows()

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Read the prompts of who joins, write one token a row. What happened, in order.

        What goes wrong is told of the jobs that it concerns, of all that have a row where nobody knows.
        """
        events: list[Event] = []
        try:
            if self._reading is None:
                self._let_join(events)
            if self._reading is not None:
                self._read_on(self._reading, events)
            elif self._joining:
                self._read(list(self._joining), events)
            if self._rows:
                self._write(events)
        except Exception as error:  # the cache may be half changed
            events += _failed([row.job for row in self._every_row()], error)
            self._forget_rows()
        return events

    # --- joining --------------------------------------------------------------------------------------------

    def _let_join(self, events: list[Event]) -> None:
        """Who waits longest, as far as rows are free and prompts fit together into the budget."""
        joining = self._joining
        while self._waiting and len(self._rows) + len(joining) < self._max_rows:
            longest = max(len(self._waiting[0].prompt), *(len(row.ids) for row in joining), 1)
            if joining and longest * (len(joining) + 1) > self._prompt_tokens:
                break
            if not self._has_memory(self._waiting[0]):
                break
            job = self._waiting.popleft()
            try:
                joining.append(self._row(job))
            except Exception as error:  # a broken prefix, no memory to read it: no other job's fault
                events += _failed([job], error)
        if joining and self._is_read_in_pieces(joining[0]):
            self._reading = _Reading(joining.pop())

    def _has_memory(self, job: Job) -> bool:
        """Whether the batch's keys and values have room for it, at its longest. One that is alone always has."""
        jobs = [job, *(row.job for row in (*self._rows, *self._joining))]
        longest = max(len(one.prompt) + one.sampling.max_tokens for one in jobs)
        return len(jobs) == 1 or buffer_columns(len(jobs), longest) * self._column_bytes <= self._cache_bytes

    def _row(self, job: Job) -> _Row:
        """Raises ServingError."""
        taken = self._residency.take(job.prefixes)
        try:
            carried = self._residency.as_one(taken)
            ids = list(job.prompt)
            if carried is not None:
                ids += [self._base.tokenizer.pad_token_id] * carried.module.num_inserted_tokens
            self._check(job, ids, carried)
            stop_ids = self._base.end_token_ids | ({carried.stop_token_id} if carried is not None else set())
            return _Row(job, taken, carried, stop_ids, ids, Sampler(job.sampling))
        except Exception:
            self._residency.give_back(taken)
            raise

    def _check(self, job: Job, ids: Sequence[int], carried: Carried | None) -> None:
        if not job.prompt:
            raise ServingError("the prompt is empty: give at least one token", "unsupported")
        strange = [i for i in (*job.prompt, *job.sampling.logit_bias) if not 0 <= i < self._num_words]
        if strange:
            raise ServingError(
                f"{strange[0]} is no token of this model: it has 0 to {self._num_words - 1}", "unsupported"
            )
        limit = self._base.context_length
        if limit is None:
            return
        if carried is not None:
            limit -= carried.shift
        if len(ids) + job.sampling.max_tokens > limit:
            raise ServingError(
                f"{len(ids)} prompt tokens and max_tokens {job.sampling.max_tokens} do not fit into the context of "
                f"{limit} tokens: shorten the prompt or lower max_tokens",
                "too_long",
            )

    def _read(self, joining: list[_Row], events: list[Event]) -> None:
        """The prompts together; where that fails each alone, so that one row's fault is not its neighbours'."""
        try:
            logits, cache = self._prompt_logits(joining)
            scored = [_scored(row, logits[place]) for place, row in enumerate(joining) if row.wants_scores]
        except Exception as error:
            if len(joining) > 1:
                _log.warning("%d prompts could not be read together: %s", len(joining), one_line(error))
                for row in joining:
                    self._read([row], events)
                return
            self._leave(joining[0])
            events += _failed([joining[0].job], error)
            return
        events += scored
        self._begin(joining, logits[:, -1:], cache, events)

    def _begin(self, joining: Sequence[_Row], logits: Tensor, cache: DynamicCache, events: list[Event]) -> None:
        """Write the first token of rows whose prompts were read, and let them join. logits: (B, 1, V)."""
        staying = []
        for place, row in enumerate(joining):
            row.length, row.memory = len(row.ids), self._attached.memory_of(place, row.carried)
            written, goes_on = self._one_more(row, logits[place, 0])
            events += written
            if goes_on:
                staying.append(place)
            else:
                self._leave(row)
        if staying:
            self._frame.join(cache, staying)
            self._rows += [joining[place] for place in staying]
            self._joining = [row for row in self._joining if row not in self._rows]

    def _is_read_in_pieces(self, row: _Row) -> bool:
        """Whether its prompt is longer than others shall wait for. What learns of a whole prompt reads it whole."""
        if len(row.ids) <= self._prompt_tokens:
            return False
        return row.carried is None or not (row.carried.module.branches() or row.carried.module.num_inserted_tokens)

    def _read_on(self, reading: _Reading, events: list[Event]) -> None:
        """One more piece of a long prompt; with the last one its row joins the batch."""
        row, begin, device = reading.row, reading.num_read, self._base.model.device
        end = min(begin + self._prompt_tokens, len(row.ids))
        try:
            self._include([row])
            self._attached.place([row.carried], len(row.ids))
            logits = self._forward(
                torch.tensor([row.ids[begin:end]], device=device), mask_of([end], end, device),
                torch.arange(begin, end, device=device)[None], reading.cache,
                logits_to_keep=0 if row.wants_scores else 1,
            )  # fmt: skip
            if row.wants_scores:
                scores = scores_of(logits[0], row.job.prompt[begin + 1 : end + 1], row.job.sampling.logprobs or 0)
                reading.logprobs += scores[0]
                reading.top += scores[1]
        except Exception as error:
            self._leave(row)
            events += _failed([row.job], error)
            return
        reading.num_read = end
        if end < len(row.ids):
            return
        self._reading, self._joining = None, [row]
        if row.wants_scores:
            events.append(PromptScored(row.job.id, tuple(reading.logprobs), tuple(reading.top)))
        self._begin([row], logits[:, -1:], reading.cache, events)

    def _include(self, joining: Sequence[_Row]) -> None:
        """Have attached what these rows carry, beside what is at work."""
        at_work = [row.carried for row in self._rows if row.carried is not None]
        self._attached.include([row.carried for row in joining if row.carried is not None], at_work)

    def _prompt_logits(self, joining: list[_Row]) -> tuple[Tensor, DynamicCache]:
        """At the prompts' last places, or at all of them where one wants its prompt scored: (B, 1 or T, V)."""
        self._include(joining)
        ids, mask, positions = left_padded(
            [row.ids for row in joining], self._base.tokenizer.pad_token_id, self._base.model.device
        )
        self._attached.place([row.carried for row in joining], ids.shape[1])
        cache = DynamicCache()
        wants_scores = any(row.wants_scores for row in joining)
        return self._forward(ids, mask, positions, cache, logits_to_keep=0 if wants_scores else 1), cache

    # --- writing --------------------------------------------------------------------------------------------

    def _write(self, events: list[Event]) -> None:
        """One token for every row."""
        logits = self._next_logits()
        for row, logits_V in zip(list(self._rows), logits, strict=True):
            written, goes_on = self._one_more(row, logits_V)
            events += written
            if not goes_on:
                self._leave(row)

    def _next_logits(self) -> Tensor:
        """Of every row: (B, V)."""
        rows, frame, device = self._rows, self._frame, self._base.model.device
        frame.begin_step()
        width = frame.width
        ends = torch.tensor([width - row.length + len(row.ids) for row in rows], device=device)
        self._attached.place([row.carried for row in rows], ends)
        self._attached.put_memories([row.memory for row in rows])
        ids = torch.tensor([[row.last_id] for row in rows], device=device)
        positions = torch.tensor([[row.length] for row in rows], device=device)
        mask = mask_of([row.length + 1 for row in rows], width + 1, device)
        logits = self._forward(ids, mask, positions, frame.cache, logits_to_keep=1)
        frame.end_step()
        for row in rows:
            row.length += 1
        return logits[:, -1]

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any, *, logits_to_keep: int) -> Tensor:
        out = self._base.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True,
            logits_to_keep=logits_to_keep,
        )  # fmt: skip
        return out.logits.float().cpu()  # type: ignore[no-any-return]

    def _one_more(self, row: _Row, logits_V: Tensor) -> tuple[Sequence[Event], bool]:
        """The row's next token, and whether it goes on."""
        sampling, job_id = row.job.sampling, row.job.id
        length = Finished(job_id, "length", _num_slots(row))
        if sampling.max_tokens == 0:
            return [length], False
        if not math.isfinite(float(logits_V.max())):  # nan is the largest of all
            return _failed([row.job], _nonsense(row)), False
        chosen, logprob, top = row.sampler.next(logits_V)
        if chosen in row.stop_ids and not sampling.ignore_eos:
            return [Finished(job_id, "stop", _num_slots(row))], False
        row.last_id = chosen
        row.num_written += 1
        token = Token(job_id, chosen, logprob, top)
        is_last = row.num_written == sampling.max_tokens
        return [token, length] if is_last else [token], not is_last

    # --- leaving --------------------------------------------------------------------------------------------

    def _every_row(self) -> list[_Row]:
        return [*self._rows, *self._joining, *([] if self._reading is None else [self._reading.row])]

    def _leave(self, row: _Row) -> None:
        """Free a row; the last running one takes its place."""
        self._residency.give_back(row.taken)
        if row in self._joining:
            self._joining.remove(row)
            return
        if self._reading is not None and row is self._reading.row:
            self._reading = None
            return
        place = self._rows.index(row)
        self._rows[place] = self._rows[-1]
        self._rows.pop()
        self._frame.leave(place, max((other.length for other in self._rows), default=0))

    def _forget_rows(self) -> None:
        for row in self._every_row():
            self._residency.give_back(row.taken)
        self._rows, self._joining, self._reading, self._frame = [], [], None, Frame()
        self._attached.release()


def _nonsense(row: _Row) -> ServingError:
    """Of logits that are no numbers."""
    if row.carried is None:
        return ServingError("the base makes numbers of no sense of this prompt (nan)", "internal")
    return ServingError("the prefix makes numbers of no sense of this prompt (nan): train it anew", "broken_prefix")


def _num_slots(row: _Row) -> int:
    return 0 if row.carried is None else row.carried.num_slots


def _scored(row: _Row, logits_TV: Tensor) -> PromptScored:
    """logits_TV: of the columns that the row was read in, padding before it and soft tokens after it among them."""
    of_prompt = logits_TV[-len(row.ids) :][: len(row.job.prompt)]
    logprobs, top = scores_of(of_prompt, row.job.prompt[1:], row.job.sampling.logprobs or 0)
    return PromptScored(row.job.id, (None, *logprobs), ((), *top))


def _failed(jobs: Sequence[Job], error: Exception) -> list[Failed]:
    """What went wrong, told of each of these."""
    if isinstance(error, AntefixError):
        kind: ServingKind = error.kind if isinstance(error, ServingError) else "broken_prefix"
        return [Failed(job.id, str(error), kind) for job in jobs]
    _log.error("jobs failed: %d", len(jobs), exc_info=error)
    message = f"the engine failed ({type(error).__name__}: {one_line(error)}); its log says more"
    return [Failed(job.id, message, "internal") for job in jobs]
