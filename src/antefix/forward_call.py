"""What a model's forward pass is given, read off its arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from antefix.attention.forest import Forest, forest_of, is_forest


def forest_in(kwargs: dict[str, Any]) -> Forest | None:
    """The forest that is fed in the place of a mask, if one is."""
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Mapping):  # one for each kind of layer, all of the same trees
        mask = next(iter(mask.values()))
    return forest_of(mask) if isinstance(mask, Tensor) and is_forest(mask) else None


def padded_on_the_left(kwargs: dict[str, Any]) -> bool:
    """Whether a row begins with padding."""
    mask = kwargs.get("attention_mask")
    return isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask[:, 0].all())


def counted_positions(kwargs: dict[str, Any], length: int, device: torch.device) -> Tensor:
    """Positions as generation counts them: from the mask where there is one, else after what is cached."""
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    past = num_cached(kwargs)
    return torch.arange(past, past + length, device=device)[None]


def num_cached(kwargs: dict[str, Any]) -> int:
    """How many tokens of every row were read before."""
    cache = kwargs.get("cache", kwargs.get("past_key_values"))  # its new name, and the one that models had before
    return 0 if cache is None else int(cache.get_seq_length())


def tokens_of(args: Any, kwargs: dict[str, Any]) -> Tensor:
    """What a model reads, as ids or as embeddings."""
    ids: Tensor | None = kwargs.get("input_ids") if not args else args[0]
    return kwargs["inputs_embeds"] if ids is None else ids
