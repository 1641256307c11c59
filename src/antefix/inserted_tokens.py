"""Soft tokens between sources and targets, at work: who feeds a source ends it with as many tokens that stand for them.

Axes: B rows, T tokens, P soft tokens, C width of embeddings, X that or the width of a linear layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from antefix.at_work import BARE, AtWork
from antefix.attention.hook import is_bare
from antefix.hooks import take_off
from antefix.parts.inserted import Inserted


class InsertedTokens:
    """The soft tokens of all attached prefixes."""

    def __init__(self, attachment: AtWork, model: PreTrainedModel, every: Sequence[Inserted | None]) -> None:
        self._attachment, self._model = attachment, model
        self._layers = dict.fromkeys(name for one in every if one is not None for name in one.added)
        self._handles: list[RemovableHandle] = []

    def install(self, modules: Mapping[str, nn.Module]) -> None:
        """Go to work. modules: the model's, by path."""
        embeddings: nn.Module = self._model.get_input_embeddings()
        self._handles.append(embeddings.register_forward_hook(self._replace))
        for name in self._layers:
            self._handles.append(modules[name].register_forward_hook(partial(self._add, name)))

    def uninstall(self, modules: Mapping[str, nn.Module]) -> None:
        """Rest."""
        take_off(self._handles)

    def forget(self) -> None:
        """Nothing is gathered here."""

    def _replace(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if is_bare():
            return output
        rows = [None if one is None else one.rows_PC for one in self._every()]
        return self._at_their_places(output, rows, torch.zeros_like(output))

    def _add(self, name: str, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if is_bare():
            return output
        return self._at_their_places(output, [None if i is None else i.added.get(name) for i in self._every()], output)

    def _every(self) -> list[Inserted | None]:
        return [made.inserted for made in self._attachment.made()]

    def _at_their_places(self, output: Tensor, values: Sequence[Tensor | None], beneath: Tensor) -> Tensor:
        """The output, with values on top of what lies beneath them where soft tokens stand."""
        attachment = self._attachment
        x = output if output.ndim == 3 else output.view(attachment.num_rows, -1, output.shape[-1])
        index = attachment.index_of_tokens(x.shape[0])
        index_BT = torch.full((1, 1), index, device=x.device) if isinstance(index, int) else index
        attachment.passes.look()
        places = attachment.places("self", x)
        counts = torch.tensor([*(0 if v is None else len(v) for v in values), 0], device=x.device)
        starts = counts.cumsum(0) - counts
        position_BT = torch.where(places.is_target, places.source_length + places.index, places.index)
        place_BT = position_BT - (places.source_length + 1 - counts[index_BT])
        here_BT = places.is_prompt & (place_BT >= 0) & (place_BT < counts[index_BT]) & (index_BT != BARE)
        table = torch.cat([v for v in values if v is not None])
        chosen_BTX = table[torch.where(here_BT, place_BT + starts[index_BT], 0)].to(x.dtype)
        return torch.where(here_BT[..., None], beneath.view(x.shape) + chosen_BTX, x).view(output.shape)
