"""What a model's forward pass is given, read off its arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from antefix.attention.forest import Forest, forest_of, is_forest
from antefix.errors import PrefixError

_NO_LABEL = -100
"""As transformers' models mark tokens that carry no loss."""


def targets_in(args: Any, kwargs: dict[str, Any], source_lengths: Tensor | None) -> tuple[bool, Tensor | None]:
    """Whether it is known which tokens are a target's, and which are: (B, T), None for all.

    source_lengths: columns of source, of all rows or of each, repeated for beams; None: as the labels say. Raises
    PrefixError for a batch of another size, and for labels that do not say it.
    """
    num_rows, length = tokens_of(args, kwargs).shape[:2]
    past = num_cached(kwargs)
    if source_lengths is None:
        labels: Tensor | None = kwargs.get("labels")
        if labels is None:
            return False, None
        first = past + _first_labelled(labels)
    else:
        if num_rows % len(source_lengths):
            raise PrefixError(f"the batch has {num_rows} rows, attachment.source_lengths has {len(source_lengths)}")
        first = source_lengths.repeat_interleave(num_rows // len(source_lengths))
    column = torch.arange(past, past + length, device=first.device)
    is_target = column >= first[:, None] - 1  # a source's last token predicts a target's first
    return True, None if bool(is_target.all()) else is_target


def _first_labelled(labels: Tensor) -> Tensor:
    """The column of every row's first label, the row's length where it has none. Raises PrefixError for gaps."""
    has_label = labels.ne(_NO_LABEL)
    begins = has_label & ~torch.nn.functional.pad(has_label, (1, 0))[:, :-1]
    if bool((begins.sum(dim=1) > 1).any()):
        raise PrefixError(
            f"labels with {_NO_LABEL} between labelled tokens do not say where a source ends, which a prefix that "
            "targets alone see needs: set attachment.source_lengths"
        )
    return torch.where(has_label.any(dim=1), has_label.int().argmax(dim=1), labels.shape[1])


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
