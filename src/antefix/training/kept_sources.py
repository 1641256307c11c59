"""Sources that are read once: their keys and values are kept for all epochs.

Where targets alone see what is learned, the frozen base reads a source the same way in every step. What stands before
a source's last token (the first that sees what targets see) is then kept as keys and values of every attention site,
and planted under the trees of a packed batch: neither forward nor backward pass goes through it again. A source is read
when a batch first needs it.

Axes: N trees, S tokens of a source but its last, G key/value heads, D key width, E value width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import psutil
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from antefix.at_work import BARE
from antefix.attachment import Attachment
from antefix.attention.hook import recording
from antefix.attention.partial import KeySet, Mask
from antefix.batches.batch import right_padded, window_of
from antefix.data.encode import Encoded, EncodedExample
from antefix.data.plan import Unit
from antefix.errors import TrainingError
from antefix.sites import find_sites


class KeptSources:
    """The sources of a data set, each read at most once; in memory, as precise as the base computes them."""

    def __init__(self, model: PreTrainedModel, attachment: Attachment, encoded: Encoded, tokens_per_batch: int) -> None:
        """Raises TrainingError where the base looks back on too few tokens, or the sources take too much memory."""
        self.rest = replace(encoded, examples=tuple(_rest_of(e) for e in encoded.examples))
        """The same data; of every source only the last token is left to be fed."""
        self._encoded, self._model, self._attachment = encoded, model, attachment
        self._tokens_per_batch = tokens_per_batch
        self._kept: dict[int, dict[nn.Module, tuple[Tensor, Tensor]]] = {}
        _check_window(model, encoded)
        _check_memory(model, encoded)
        # Always the same sources are read together, whatever asks for one of them first: what a source's states are
        # rounded to must not depend on where a run was resumed.
        self._group_of = {n: group for group in self._groups() for n in group}

    def before(self, units: Sequence[Unit]) -> dict[nn.Module, KeySet]:
        """By attention module: what stands before the trees of these units, (N, G, S, D) and (N, G, S, E)."""
        examples = [unit.example for unit in units]
        for n in examples:
            if n in self._group_of and n not in self._kept:
                self._read(self._group_of[n])
        lengths_N = torch.tensor([self.rest.examples[n].num_before for n in examples])
        longest = int(lengths_N.max())
        if longest == 0:
            return {}
        device = self._model.device
        visible = (torch.arange(longest) < lengths_N[:, None])[:, None, None].to(device)
        mask = None if bool(visible.all()) else Mask.of(visible, torch.float32)  # one for all sites
        kept = [self._kept.get(n) for n in examples]
        some = next(k for k in kept if k is not None)
        sets = {}
        for module, empty in some.items():
            rows = [tuple(x[:0] for x in empty) if k is None else k[module] for k in kept]
            key, value = (pad_sequence([row[part] for row in rows], batch_first=True) for part in (0, 1))
            sets[module] = KeySet(key.transpose(1, 2).to(device), value.transpose(1, 2).to(device), mask)
        return sets

    @torch.no_grad()
    def _read(self, group: Sequence[int]) -> None:
        """Read sources through the bare base."""
        sources = [self._encoded.examples[n].source[:-1] for n in group]
        ids, mask = (x.to(self._model.device) for x in right_padded(sources, pad=0))
        rows, self._attachment.rows = self._attachment.rows, [BARE]
        try:
            with recording(self._model) as calls:
                self._model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        finally:
            self._attachment.rows = rows
        for place, (n, source) in enumerate(zip(group, sources, strict=True)):
            self._kept[n] = {
                c.module: (_tokens_first(c.key, place, len(source)), _tokens_first(c.value, place, len(source)))
                for c in calls
            }

    def _groups(self) -> list[list[int]]:
        """Sources of like lengths, within the token budget; those of a single token need no reading."""
        groups: list[list[int]] = []
        lengths = {n: e.num_before for n, e in enumerate(self.rest.examples) if e.num_before > 0}
        for n in sorted(lengths, key=lambda n: -lengths[n]):
            if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= self._tokens_per_batch:
                groups[-1].append(n)
            else:
                groups.append([n])
        return groups


def _rest_of(example: EncodedExample) -> EncodedExample:
    return replace(example, source=example.source[-1:], num_before=len(example.source) - 1)


def _tokens_first(x_BGSD: Tensor, row: int, length: int) -> Tensor:
    """A row's own copy, (S, G, D), in the processor's memory."""
    return x_BGSD[row, :, :length].transpose(0, 1).cpu().contiguous().clone()


def _check_window(model: PreTrainedModel, encoded: Encoded) -> None:
    window = window_of(model.config.get_text_config())
    longest = max((len(e.source) + max((len(t) for t in e.targets), default=0) for e in encoded.examples), default=0)
    if window is not None and longest > window:
        raise TrainingError(
            f"keep_source_states: this base looks back on {window} tokens, the longest text has {longest}; leave it out"
        )


def _check_memory(model: PreTrainedModel, encoded: Encoded) -> None:
    values_a_token = sum(s.num_key_value_heads * (s.key_width + s.value_width) for s in find_sites(model).attention)
    num_tokens = sum(len(e.source) - 1 for e in encoded.examples)
    needed, free = num_tokens * values_a_token * model.dtype.itemsize, psutil.virtual_memory().available
    if 2 * needed > free:  # there is a dev set as well, and there may be other processes
        raise TrainingError(
            f"keep_source_states: {num_tokens:,} source tokens take {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB "
            "are free, and half of them must stay so; leave it out"
        )
