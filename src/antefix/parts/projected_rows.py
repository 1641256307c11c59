"""Rows that become keys and values through the base's own frozen projections.

Axes: P rows, C width of hidden states.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from antefix.attention.hook import bare, projected
from antefix.hooks import while_hooked
from antefix.parts.key_value import KeyValue
from antefix.sites import Site, read_one_token


class Projections:
    """What the attention modules of some sites make of rows in the place of hidden states, all at position 0.

    A module is run until it reaches transformers' registry, so that fused projections and norms of keys count too. It
    gets what it is given in a forward pass of one token at position 0, where rotary embedding turns nothing.
    """

    def __init__(self, model: PreTrainedModel, sites: Iterable[Site]) -> None:
        self._model = model
        self._modules = {site.name: model.get_submodule(site.module) for site in sites}
        self._given: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._device: torch.device | None = None

    def __call__(self, site: str, rows_PC: Tensor) -> KeyValue:
        """Keys (G, P, D) and values (G, P, E), differentiable."""
        if self._device != self._model.device:
            self._given, self._device = self._listened(), self._model.device
        args, kwargs = self._given[site]
        rows = rows_PC[None].to(self._model.dtype)
        if args:
            args = (rows, *args[1:])
        else:
            kwargs = {**kwargs, "hidden_states": rows}
        key, value = projected(self._model, self._modules[site], args, kwargs)
        return KeyValue(key[0].float(), value[0].float())

    @torch.no_grad()
    def _listened(self) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
        """What every module is given in a forward pass of one token."""
        given: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

        def listener(name: str) -> Any:
            def listen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                given[name] = (args, kwargs)

            return listen

        handles = [m.register_forward_pre_hook(listener(n), with_kwargs=True) for n, m in self._modules.items()]
        with while_hooked(handles), bare():
            read_one_token(self._model)
        return given
