"""What a model's forward pass is given, read off its arguments.

Axes: B rows, S tokens, those read before included.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from antefix.attention.branch import Places
from antefix.attention.forest import Forest, forest_of, is_forest
from antefix.errors import PrefixError

_NO_LABEL = -100
"""As transformers' models mark tokens that carry no loss."""


def target_begins(args: Any, kwargs: dict[str, Any], source_lengths: Tensor | None) -> Tensor | None:
    """The column of every row, what is cached included, from which on it is a target's: (B, 1); None: nobody knows.

    source_lengths: columns of source, of all rows or of each, repeated for beams; None: as the labels say. Raises
    PrefixError for a batch of another size, and for labels that do not say it.
    """
    num_rows = len(tokens_of(args, kwargs))
    if source_lengths is None:
        labels: Tensor | None = kwargs.get("labels")
        if labels is None:
            return None
        first = num_cached(kwargs) + _first_labelled(labels)
    else:
        if num_rows % len(source_lengths):
            raise PrefixError(f"the batch has {num_rows} rows, attachment.source_lengths has {len(source_lengths)}")
        first = source_lengths.repeat_interleave(num_rows // len(source_lengths))
    return (first[:, None] - 1).clamp(min=0)  # a source's last token predicts a target's first


def targets_in(args: Any, kwargs: dict[str, Any], begins_B1: Tensor) -> Tensor | None:
    """Which of the columns that are fed are a target's: (B, T), None for all."""
    past, length = num_cached(kwargs), tokens_of(args, kwargs).shape[1]
    is_target = torch.arange(past, past + length, device=begins_B1.device) >= begins_B1
    return None if bool(is_target.all()) else is_target


def real_tokens(args: Any, kwargs: dict[str, Any], past: int, before_BS: Tensor | None) -> Tensor:
    """1 for the tokens of texts that are read so far, 0 for padding: (B, past + T).

    past: how many of every row were read before. before_BS: what this was in the pass before; asked where the mask does
    not say it, as masks that are prepared for static caches do not.
    """
    ids = tokens_of(args, kwargs)
    num_rows, length = ids.shape[:2]
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Mapping):  # one for each kind of layer
        mask = next(iter(mask.values()))
    if not isinstance(mask, Tensor):
        return torch.ones(num_rows, past + length, dtype=torch.long, device=ids.device)
    if mask.ndim == 2:
        return mask[:, : past + length].long()
    if past > 0:  # what is fed one by one is no padding
        ones = torch.ones(num_rows, past + length, dtype=torch.long, device=ids.device)
        return ones if before_BS is None else torch.cat([before_BS[:, :past], ones[:, past:]], dim=1)
    place = torch.arange(length, device=ids.device)
    sees_itself = mask[:, 0, place, place].expand(num_rows, -1)  # padding is seen by nobody
    return (sees_itself if mask.dtype == torch.bool else sees_itself == 0).long()


def text_places(mask_BS: Tensor, past: int, begins_B1: Tensor) -> Places:
    """Where the tokens of a decoder without an encoder stand. mask_BS: as `real_tokens` gives it."""
    num_rows, length = mask_BS.shape[0], mask_BS.shape[1] - past
    count, column = mask_BS.cumsum(1), torch.arange(past + length, device=mask_BS.device)
    unread_B1 = (begins_B1 - (past + length)).clamp(min=0)  # of a source that is fed in pieces
    source_length = (mask_BS * (column < begins_B1)).sum(1, keepdim=True) + unread_B1
    real, index, is_target = (x[:, -length:] for x in (mask_BS.bool(), count - 1, column >= begins_B1))
    return Places(
        is_source=real & ~is_target,
        is_target=real & is_target,
        index=torch.where(is_target, index - source_length, index).clamp(min=0),
        source_length=source_length.expand(num_rows, length),
        text=_rows(num_rows, length, mask_BS.device),
        num_texts=num_rows,
        begins=past == 0,
        sources_end=not bool(unread_B1.any()),
    )


def forest_places(forest: Forest, kwargs: dict[str, Any]) -> Places:
    """Where the tokens of packed rows stand."""
    position, tree, is_target = kwargs["position_ids"][0], forest.tree_of_token, forest.is_target
    target_position = torch.where(is_target, position, torch.iinfo(position.dtype).max)
    source_length = torch.full((forest.num_trees,), torch.iinfo(position.dtype).max, device=position.device)
    source_length = source_length.scatter_reduce(0, tree, target_position, "amin")[tree]
    return Places(
        is_source=~is_target[None],
        is_target=is_target[None],
        index=torch.where(is_target, position - source_length, position)[None],
        source_length=source_length[None],
        text=tree[None],
        num_texts=forest.num_trees,
        begins=True,
    )


def encoder_places(args: Any, kwargs: dict[str, Any]) -> Places:
    """Where the tokens of an encoder stand: all of them are a source's."""
    ids = tokens_of(args, kwargs)
    num_rows, length = ids.shape[:2]
    mask = _mask_of(kwargs, num_rows, length, ids.device)
    return Places(
        is_source=mask.bool(),
        is_target=torch.zeros_like(mask, dtype=torch.bool),
        index=(mask.cumsum(1) - 1).clamp(min=0),
        source_length=mask.sum(1, keepdim=True).expand(num_rows, length),
        text=_rows(num_rows, length, ids.device),
        num_texts=num_rows,
        begins=True,
    )


def decoder_places(past: int, num_rows: int, length: int, device: torch.device) -> Places:
    """Where the tokens of an encoder-decoder's decoder stand: all of them are a target's. past: as in `text_places`."""
    nothing = torch.zeros(num_rows, length, dtype=torch.long, device=device)
    return Places(
        is_source=nothing.bool(),
        is_target=~nothing.bool(),
        index=nothing + torch.arange(past, past + length, device=device),
        source_length=nothing,
        text=_rows(num_rows, length, device),
        num_texts=num_rows,
        begins=past == 0,
    )


def _mask_of(kwargs: dict[str, Any], num_rows: int, length: int, device: torch.device) -> Tensor:
    """1 for tokens, 0 for padding: (B, length)."""
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask[:, -length:].long()  # rows before a text may have made it wider
    return torch.ones(num_rows, length, dtype=torch.long, device=device)


def _rows(num_rows: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(num_rows, device=device)[:, None].expand(num_rows, length)


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
