"""The key/value cache of a running batch: rows of unlike lengths that end in the same column.

A row's tokens stand side by side up to the last column, with padding before them, as in a batch that is padded on the
left; so windows, masks and roles are counted as everywhere else. The columns in use are a frame that moves to the right
through longer buffers: a token is written in place, nothing is copied to make room for it, and only when the frame
comes to the buffers' end it goes back to their beginning. A row that joins is copied in after the others; the last
one takes the place of one that leaves. Sliding layers keep all columns; the model's masks do the sliding. Padding is
zeros: what no row sees is multiplied by nothing, and that must not be infinite.

Axes: B rows, G key/value heads, S columns, T new columns, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from antefix.base import Base
from antefix.errors import ServingError
from antefix.sites import find_sites

_FIRST_ROOM = 128
"""Columns beyond what is needed, at least."""


class Frame:
    """Rows and columns in use, and the buffers of all layers. `cache` is what a model is given."""

    def __init__(self) -> None:
        self.num_rows = 0
        self._start = self._end = 0
        self._layers: list[_Layer] = []
        self.cache = Cache(layers=self._layers)  # type: ignore[arg-type]

    @property
    def width(self) -> int:
        """Columns in use: as many as the longest row has tokens."""
        return self._end - self._start

    def columns(self, num_new: int) -> slice:
        """Those in use and so many more, in the buffers."""
        return slice(self._start, self._end + num_new)

    def join(self, read: DynamicCache, picked: Sequence[int]) -> None:
        """Let the picked rows of a cache in, which end in its last column too, after those that are here."""
        layers: list[Any] = read.layers
        width = layers[0].keys.shape[2]
        if not self._layers:
            self._layers += [_Layer(self, layer) for layer in layers]
        first, last = self.num_rows, self.num_rows + len(picked)
        self._make_room(last, max(self.width, width))
        for layer, source in zip(self._layers, layers, strict=True):
            for new, old in ((layer.keys, source.keys), (layer.values, source.values)):
                new[first:last, :, self._end - width : self._end] = old[list(picked)]
                new[first:last, :, self._start : self._end - width] = 0.0
        self.num_rows = last

    def begin_step(self) -> None:
        """Make sure that one more column fits."""
        if self._end == self._capacity:
            self._move(self.num_rows, self.width, max(self._capacity, _with_room(self.width)))

    def end_step(self) -> None:
        """One more column is in use."""
        self._end += 1

    def leave(self, row: int, longest: int) -> None:
        """A row goes, and the last one takes its place. longest: the tokens of the longest row that stays.

        Buffers of which little is used by now become small again.
        """
        last = self.num_rows - 1
        if row != last:
            for layer in self._layers:
                for x in (layer.keys, layer.values):
                    x[row, :, self._start : self._end] = x[last, :, self._start : self._end]
        self.num_rows = last
        self._start = self._end - longest
        if last == 0:
            self._start = self._end = 0
            self._layers.clear()
        elif self._capacity > 2 * _with_room(longest):
            self._move(last, longest, _with_room(longest))

    @property
    def _capacity(self) -> int:
        return int(self._layers[0].keys.shape[2])

    def _make_room(self, num_rows: int, width: int) -> None:
        if width > self._end or num_rows > len(self._layers[0].keys):
            self._move(num_rows, width, max(self._capacity, _with_room(width)))
        start = self._end - width
        for layer in self._layers:  # a longer row was here before
            for x in (layer.keys, layer.values):
                x[: self.num_rows, :, start : self._start] = 0.0
        self._start = start

    def _move(self, num_rows: int, width: int, capacity: int) -> None:
        """To the left end of buffers that hold so many rows and columns."""
        old_rows, old_width = self.num_rows, self.width
        rows = max(len(self._layers[0].keys), 1 << (num_rows - 1).bit_length())
        for layer in self._layers:
            for name in ("keys", "values"):
                old: Tensor = getattr(layer, name)
                used = old[:old_rows, :, self._start : self._end]
                if (rows, capacity) == (old.shape[0], old.shape[2]):
                    new, used = old, used.clone()
                else:
                    new = old.new_zeros(rows, old.shape[1], capacity, old.shape[3])
                new[:old_rows, :, width - old_width : width] = used
                setattr(layer, name, new)
        self._start, self._end = width - old_width, width


def _with_room(width: int) -> int:
    """Columns for so many and those to come. A step of many rows costs far more than what is copied now and then."""
    return width + max(width // 4, _FIRST_ROOM)


def buffer_columns(num_rows: int, width: int) -> int:
    """How many columns the buffers of so many rows have, all rows counted."""
    return (1 << (num_rows - 1).bit_length()) * _with_room(width)


def refuse_unfit(base: Base) -> None:
    """Raises ServingError for a base that does not read from left to right, or keeps more of a text than a frame can.

    What a state-space layer keeps of a text has no columns. Layers at the end may keep nothing, where they read what
    earlier ones keep.
    """
    if not find_sites(base.model).is_causal:
        raise ServingError(
            f"the base '{base.name}' is no decoder that reads from left to right: serve one like GPT-2 or Llama",
            "unsupported",
        )
    kept = [type(layer) for layer in DynamicCache(config=base.model.config).layers]
    while kept and kept[-1] is DummyLayer:
        kept.pop()
    if others := {one for one in kept if one not in (DynamicLayer, DynamicSlidingWindowLayer)}:
        named = ", ".join(sorted(one.__name__ for one in others))
        raise ServingError(
            f"the base '{base.name}' keeps more of a text than keys and values ({named}): serve one whose layers are "
            "all attention, like Llama",
            "unsupported",
        )


def column_bytes(model: PreTrainedModel) -> int:
    """What a column of one row takes: the keys and values of a token at all layers."""
    sites = find_sites(model).of_kinds(("self",))
    return sum(s.num_key_value_heads * (s.key_width + s.value_width) for s in sites) * model.dtype.itemsize


class _Layer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's buffers, as transformers asks for them."""

    is_sliding = False

    def __init__(self, frame: Frame, like: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._frame = frame
        keys, values = (x.new_zeros(0, x.shape[1], 0, x.shape[3]) for x in (like.keys, like.values))
        self.keys: Tensor = keys
        self.values: Tensor = values
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Done from the beginning."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Write new columns of all rows, and return all that these rows see."""
        num_new = key_states.shape[2]
        columns = self._frame.columns(num_new)
        new = slice(columns.stop - num_new, columns.stop)
        num_rows = self._frame.num_rows
        self.keys[:num_rows, :, new] = key_states
        self.values[:num_rows, :, new] = value_states
        return self.keys[:num_rows, :, columns], self.values[:num_rows, :, columns]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a mask covers, and the first of them."""
        return self._frame.width + query_length, 0

    def get_seq_length(self) -> int:
        """Columns in use."""
        return self._frame.width

    def get_max_length(self) -> int:
        """There is no most."""
        return -1


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and positions of texts that end in the same column: each (B, longest)."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = mask_of([len(row) for row in rows], longest, device)
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


def mask_of(lengths: Sequence[int], width: int, device: torch.device) -> Tensor:
    """1 for the last so many columns of each row: (B, width)."""
    begins = width - torch.tensor(lengths, device=device)
    return (torch.arange(width, device=device) >= begins[:, None]).long()
