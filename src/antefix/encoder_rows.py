"""Rows that stand before the texts of a batch in an encoder, at work in a model.

They enter at the input of the first layer and leave with the encoder's output: an encoder alone (BERT) returns what it
returns without them; in an encoder-decoder they stay, and cross-attention sees them. No text moves: its tokens have the
positions that they have alone. Rows of different numbers, and none, mix: shorter ones stand right before the text, and
what stands before them is masked.

Axes: B rows of the batch, P rows before a text, T tokens, C width of hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from antefix.at_work import BARE, AtWork
from antefix.attention.branch import Places
from antefix.attention.hook import is_bare
from antefix.errors import PrefixError
from antefix.hooks import take_off
from antefix.parts.rows import EncoderRows
from antefix.sites import Site, Sites


class RowsAtWork:
    """The rows of all attached prefixes in one model's encoder."""

    def __init__(self, model: PreTrainedModel, sites: Sites, attachment: AtWork) -> None:
        self._model, self._attachment = model, attachment
        self._sites = sites.of_kinds(("encoder_self",))
        self._is_encoder_decoder = sites.is_encoder_decoder
        self._handles: list[RemovableHandle] = []

    def install(self, modules: Mapping[str, nn.Module]) -> None:
        """Go to work. modules: the model's, by path."""
        for site in self._sites:
            hook = self._adder(site)
            self._handles.append(modules[site.layer_module].register_forward_pre_hook(hook, with_kwargs=True))
        encoder = modules[_container(self._sites[0].layer_module)]
        if self._is_encoder_decoder:
            self._handles.append(self._model.register_forward_pre_hook(self._widen_mask, with_kwargs=True))
            self._handles.append(encoder.register_forward_pre_hook(self._narrow_mask, with_kwargs=True))
        else:
            self._handles.append(encoder.register_forward_hook(self._without_rows))

    @property
    def is_idle(self) -> bool:
        """Whether no row of the batch at hand has such rows: then the base is left as it is."""
        index = self._attachment.shared_index
        return is_bare() or index == BARE or (index is not None and self._every()[index] is None)

    def uninstall(self, modules: Mapping[str, nn.Module]) -> None:
        """Leave the model as it was."""
        take_off(self._handles)

    def forget(self) -> None:
        """Nothing is gathered here."""

    def seen(self, mask: Tensor | None, query: Tensor) -> Tensor | None:
        """The mask of an encoder's self-attention with the rows in it: (B, 1, P + T, P + T).

        mask: as the base made it for the text alone: (B or 1, 1, T or 1, T), the same for all queries.
        """
        if self.is_idle:
            return mask
        num_rows, length = query.shape[0], query.shape[2]
        is_there = self._is_there(num_rows, query.device)
        if mask is None and bool(is_there.all()):
            return None
        if mask is None:
            text = torch.ones(num_rows, length - is_there.shape[1], dtype=torch.bool, device=query.device)
        else:
            text = mask[:, 0, 0].expand(num_rows, -1)
            text = text if text.dtype == torch.bool else text == 0
            if self._is_encoder_decoder and not bool(text[:, 0].all()):
                raise PrefixError(
                    "rows before a text need padding on the right in an encoder: they stand beside the text"
                )
            if not bool((mask == mask[:, :, :1]).all()):
                raise PrefixError("rows before a text need an encoder whose tokens all see the same: use prefix_tuning")
        seen = torch.cat([is_there, text], dim=1)
        return (
            torch.zeros(seen.shape, dtype=query.dtype, device=query.device)
            .masked_fill_(~seen, torch.finfo(query.dtype).min)[:, None, None]
            .expand(-1, 1, length, -1)
        )

    def _is_there(self, num_rows: int, device: torch.device) -> Tensor:
        """Which of the places before a text hold one of its rows: (B, P)."""
        counts = torch.tensor([*(_count(rows) for rows in self._every()), 0], device=device)
        of_row = counts[self._index(num_rows, device)]
        longest = int(counts.max())
        return torch.arange(longest, device=device) >= longest - of_row[:, None]

    def _index(self, num_rows: int, device: torch.device) -> Tensor:
        """Of the prefix that a row has; -1 is the last: none."""
        index = self._attachment.rows_of(num_rows)
        return torch.full((num_rows,), index, device=device) if isinstance(index, int) else index

    def _stacked(self, every: Sequence[Tensor | None], num_rows: int) -> Tensor:
        """Right-aligned rows of every row of the batch, zeros before them: (B, P, C)."""
        some = next(t for t in every if t is not None)
        longest = self._longest()
        nothing = some.new_zeros(longest, some.shape[1])
        padded = [nothing if t is None else pad(t, (0, 0, longest - len(t), 0)) for t in every]
        return torch.stack([*padded, nothing])[self._index(num_rows, some.device)]

    def _adder(self, site: Site) -> Any:
        is_first = site is self._sites[0]

        def change(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            if self.is_idle:
                return args, kwargs
            states: Tensor = args[0] if args else kwargs["hidden_states"]
            every = self._every()
            if is_first:
                first = self._stacked([None if r is None else r.first_PC for r in every], len(states))
                states = torch.cat([first.to(states.dtype), states], dim=1)
            added = [None if r is None else r.added.get(site.name) for r in every]
            if any(a is not None for a in added):
                stacked = self._stacked(added, len(states))
                states = states + pad(stacked, (0, 0, 0, states.shape[1] - stacked.shape[1])).to(states.dtype)
            return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

        return change

    def _without_rows(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self.is_idle:
            return output
        output.last_hidden_state = output.last_hidden_state[:, self._longest() :]
        return output

    def _widen_mask(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """What the decoder may see of an encoder's output: the rows too."""
        if self.is_idle:
            return args, kwargs
        mask = kwargs.get("attention_mask")
        if mask is None:
            given = kwargs.get("encoder_outputs")
            ids = given[0][:, self._longest() :] if given is not None else args[0] if args else kwargs.get("input_ids")
            ids = kwargs["inputs_embeds"] if ids is None else ids
            mask = torch.ones(ids.shape[:2], dtype=torch.long, device=ids.device)
        is_there = self._is_there(len(mask), mask.device)
        return args, {**kwargs, "attention_mask": torch.cat([is_there.to(mask.dtype), mask], dim=1)}

    def _narrow_mask(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The encoder's own mask is that of the text."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        ids = kwargs["inputs_embeds"] if ids is None else ids
        mask = kwargs.get("attention_mask")
        if self.is_idle or mask is None or mask.shape[1] == ids.shape[1]:
            return args, kwargs
        return args, {**kwargs, "attention_mask": mask[:, -ids.shape[1] :]}

    def beside(self, places: Places) -> Places:
        """Where queries stand, with the rows before the texts, which are no text's."""
        if self.is_idle:
            return places
        count = self._longest()
        return replace(
            places,
            is_source=pad(places.is_source, (count, 0)),
            is_target=pad(places.is_target, (count, 0)),
            index=pad(places.index, (count, 0)),
            source_length=pad(places.source_length, (count, 0)),
            text=torch.cat([places.text[:, :1].expand(-1, count), places.text], dim=1),
        )

    def _every(self) -> list[EncoderRows | None]:
        return [made.rows for made in self._attachment.made()]

    def _longest(self) -> int:
        return max(_count(rows) for rows in self._every())


def _count(rows: EncoderRows | None) -> int:
    return 0 if rows is None else len(rows.first_PC)


def _container(layer: str) -> str:
    """The module whose list a layer stands in: its path without the list's name and the numbers in it."""
    parts = layer.split(".")
    first_number = next(n for n, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: first_number - 1])
