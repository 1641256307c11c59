"""Attention over tokens and slots, in the form that fits.

Axes: B rows, T queries, S keys, H query heads, G key/value heads, D key width, E value width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from antefix.attention.joined import joined
from antefix.attention.partial import (
    KeySet,
    Mask,
    Partial,
    Scores,
    concatenated,
    explicit,
    explicit_union,
    fused,
    fused_kernel_fits,
)


def attend(query_BHTD: Tensor, tokens: KeySet, slots: Sequence[KeySet], scores: Scores) -> Tensor:
    """Attention of every query over its tokens and over all slots, in whatever precision these are kept: B, H, T, E."""
    slots = [s for s in slots if s.key_BGSD.shape[2] > 0]
    if scores.plain and query_BHTD.shape[2] == 1 and slots and not torch.is_grad_enabled() and _is_by_row(tokens.mask):
        return joined(query_BHTD, tokens, slots, scores.scale)
    slots = [_in_precision(s, query_BHTD.dtype) for s in slots]
    num_slots = sum(s.key_BGSD.shape[2] for s in slots)
    if scores.plain and num_slots > tokens.key_BGSD.shape[2] and fused_kernel_fits(query_BHTD, tokens.value_BGSE):
        return fused(query_BHTD, [tokens, *slots], scores.scale)
    if scores.masked_only:
        return concatenated(query_BHTD, tokens, slots, scores)
    return explicit(query_BHTD, tokens, slots, scores)


def attend_partial(query_BHTD: Tensor, tokens: KeySet, slots: Sequence[KeySet], scores: Scores) -> Partial:
    """The same with its normaliser, for what else takes part in the softmax."""
    seen = [_in_precision(s, query_BHTD.dtype) for s in slots if s.key_BGSD.shape[2] > 0]
    return explicit_union(query_BHTD, tokens, seen, scores)


def _is_by_row(mask: Mask | None) -> bool:
    """Whether a mask is the same for all heads."""
    return mask is None or mask.additive.shape[1] == 1


def _in_precision(keys: KeySet, dtype: torch.dtype) -> KeySet:
    mask = None if keys.mask is None else Mask(keys.mask.additive.to(dtype), keys.mask.blind)
    return keys._replace(key_BGSD=keys.key_BGSD.to(dtype), value_BGSE=keys.value_BGSE.to(dtype), mask=mask)
