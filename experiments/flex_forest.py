"""Attention over a forest in one kernel, FlexAttention, for a GPU: measured by `forest_on_gpu.py`, not in the library.

Tokens are numbered as a walk through every tree meets them, a token before what follows it. What follows a token then
has the numbers from its own up to one past its last descendant's, so that *is an ancestor of, or is itself* is a
comparison of whole numbers: first[k] <= number[q] < past[k]. Slots are keys like others: those of a tree span the
tree's numbers, those that all trees share are there once for every band of numbers, and one that a row does not have
spans none.

Axes: T tokens, N trees, P slots, S keys (of slots, then of tokens), H query heads, G key/value heads, D key width,
E value width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from antefix.attention.partial import KeySet, additive_of_slots
from antefix.attention.runs import ROOT

_BLOCK = 128
"""Queries, and keys, that the kernel takes or leaves together."""
_BAND = 1024
"""Queries that share a copy of the slots that all have: the gradient of a block of keys is summed by one processor,
query by query, and all others would wait for the one that has the only copy."""


@dataclass(frozen=True)
class Ancestry:
    """Who descends from whom, as spans of numbers; whole numbers of 32 bits."""

    number_T: Tensor
    past_T: Tensor
    depth_T: Tensor
    """How many tokens stand before one in its own text."""
    is_target_T: Tensor
    span_N2: Tensor
    """Of every tree: its first number, and one past its last."""
    window: int
    """How many tokens back a token sees, itself counted."""
    _latest: dict[tuple[Any, ...], BlockMask] = field(default_factory=dict)

    @classmethod
    def of(cls, parents: Sequence[int], is_target_T: Tensor, window: int) -> Ancestry:
        """parents: of every token the place of the one before it, `ROOT` where a tree begins; parents come first."""
        sizes = [1] * len(parents)
        for token in range(len(parents) - 1, -1, -1):
            if parents[token] != ROOT:
                sizes[parents[token]] += sizes[token]
        numbers, depths, free, spans = [], [], [], []
        after = 0  # the number that the next tree begins with
        for token, parent in enumerate(parents):
            number, depth = (after, 0) if parent == ROOT else (free[parent], depths[parent] + 1)
            if parent == ROOT:
                after += sizes[token]
                spans.append((number, after))
            else:
                free[parent] += sizes[token]
            numbers.append(number)
            depths.append(depth)
            free.append(number + 1)
        number_T, size_T, depth_T, span_N2 = (
            torch.tensor(x, dtype=torch.int32, device=is_target_T.device) for x in (numbers, sizes, depths, spans)
        )
        return cls(number_T, number_T + size_T, depth_T, is_target_T, span_N2, window)

    def attend(self, query_1HTD: Tensor, tokens: KeySet, slots: Sequence[KeySet], scale: float) -> Tensor:
        """Attention of every token over its ancestors, itself and its tree's slots: 1, H, T, E."""
        sides = [self._in_one_row(s, query_1HTD.dtype) for s in slots]
        key, value = (
            torch.cat([*(side[part] for side in sides), of_tokens], dim=2)
            for part, of_tokens in ((0, tokens.key_BGSD), (1, tokens.value_BGSE))
        )
        return _compiled()(  # type: ignore[no-any-return]
            query_1HTD, key, value, block_mask=self._block_mask(slots), scale=scale,
            enable_gqa=key.shape[1] < query_1HTD.shape[1], kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
        )  # fmt: skip

    def _block_mask(self, slots: Sequence[KeySet]) -> BlockMask:
        """Made once for layers with like slots."""
        key = tuple((s.mask, s.for_targets, s.key_BGSD.shape[0], s.key_BGSD.shape[2]) for s in slots)
        if key not in self._latest:
            self._latest.clear()
            self._latest[key] = self._made_block_mask(slots)
        return self._latest[key]

    def _made_block_mask(self, slots: Sequence[KeySet]) -> BlockMask:
        spans = [self._spans_of(s) for s in slots]
        first_S = torch.cat([*(span[0] for span in spans), self.number_T])
        past_S = torch.cat([*(span[1] for span in spans), self.past_T])
        num_slots, num_tokens = len(first_S) - len(self.number_T), len(self.number_T)
        depth_S = torch.cat([self.depth_T.new_full((num_slots,), num_tokens), self.depth_T])  # in every window
        open_S = torch.cat(
            [
                self.is_target_T.new_full((len(span[0]),), not s.for_targets)
                for s, span in zip(slots, spans, strict=True)
            ]
            + [torch.ones_like(self.is_target_T)]
        )
        number_T, depth_T, is_target_T, window = self.number_T, self.depth_T, self.is_target_T, self.window

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            number = number_T[query]
            is_above = (first_S[key] <= number) & (number < past_S[key])
            return is_above & (depth_T[query] - depth_S[key] < window) & (is_target_T[query] | open_S[key])

        lowest, highest = _extremes(number_T, number_T)
        first, past = _extremes(first_S, past_S)
        meet = (first[None, :] <= highest[:, None]) & (past[None, :] > lowest[:, None])
        return BlockMask.from_kv_blocks(
            meet.sum(1, dtype=torch.int32)[None, None],
            meet.to(torch.int8).argsort(dim=1, descending=True, stable=True).to(torch.int32)[None, None],
            BLOCK_SIZE=_BLOCK, mask_mod=sees, seq_lengths=(num_tokens, num_slots + num_tokens),
        )  # fmt: skip

    def _spans_of(self, slots: KeySet) -> tuple[Tensor, Tensor]:
        """First and past numbers of the queries that see each slot, row by row: twice (rows * P,)."""
        span_L2 = self._bands if _num_rows(slots) == 1 else self.span_N2
        has_slot = additive_of_slots(slots, len(span_L2)) > -torch.inf
        has_slot = torch.nn.functional.pad(has_slot, (0, self._gap(slots)))
        first, past = (x.expand_as(has_slot).flatten() for x in (span_L2[:, :1], span_L2[:, 1:]))
        return first, torch.where(has_slot.flatten(), past, first)

    def _in_one_row(self, slots: KeySet, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The slots of all rows or bands one after the other: keys (1, G, rows * P, D) and values."""
        num_rows = _num_rows(slots)
        copies = len(self._bands) if num_rows == 1 else num_rows
        rows = (x.expand(copies, -1, -1, -1).to(dtype) for x in (slots.key_BGSD, slots.value_BGSE))
        padded = (torch.nn.functional.pad(x, (0, 0, 0, self._gap(slots))) for x in rows)
        key, value = (x.transpose(0, 1).flatten(1, 2)[None] for x in padded)
        return key, value

    def _gap(self, slots: KeySet) -> int:
        """What is missing for every band's slots to be blocks of their own."""
        is_banded = _num_rows(slots) == 1 and len(self._bands) > 1
        return -slots.key_BGSD.shape[2] % _BLOCK if is_banded else 0

    @cached_property
    def _bands(self) -> Tensor:
        first = torch.arange(0, len(self.number_T), _BAND, dtype=torch.int32, device=self.number_T.device)
        return torch.stack([first, first + _BAND], dim=1)


def _num_rows(slots: KeySet) -> int:
    return max(slots.key_BGSD.shape[0], 1 if slots.mask is None else slots.mask.additive.shape[0])


def _extremes(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Of every block the least and the greatest."""
    gap = -len(low) % _BLOCK
    low, high = (torch.cat([x, x[-1:].expand(gap)]).view(-1, _BLOCK) for x in (low, high))
    return low.amin(1), high.amax(1)


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=True)
