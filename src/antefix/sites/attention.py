"""Attention sites, found by one recorded forward pass of two tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from antefix.attention.hook import RecordedCall
from antefix.errors import BaseModelError
from antefix.hooks import while_hooked
from antefix.sites.reading import DECODER_TOKENS, ENCODER_TOKENS, recorded, some_ids
from antefix.sites.site import KINDS, Kind, Layers, PositionKind, Site, Sites


@torch.no_grad()
def look_at_attention(model: PreTrainedModel, find_layers: Callable[[], Layers]) -> Sites:
    """The attention sites. Raises BaseModelError where no attention call passes transformers' attention registry."""
    encoder_ids, decoder_ids = (some_ids(model, count) for count in (ENCODER_TOKENS, DECODER_TOKENS))
    projections: dict[nn.Module, nn.Module] = {}
    calls = recorded(
        model, encoder_ids, decoder_ids, None, lambda calls: _watching_projections(model, calls, projections)
    )
    if not calls:
        raise BaseModelError(
            f"{type(model).__name__} cannot carry a prefix: none of its attention passes transformers' attention "
            "interface (AttentionInterface); use a model whose file calls ALL_ATTENTION_FUNCTIONS"
        )
    names = {module: name for name, module in model.named_modules()}
    if len({call.module for call in calls}) < len(calls):
        raise BaseModelError(
            f"{type(model).__name__} cannot carry a prefix: its layers share attention modules, so that slots could "
            "not tell them apart; use a model without shared layers"
        )
    encoder_names = _encoder_prefix(model, names)
    counts: dict[Kind, int] = dict.fromkeys(KINDS, 0)
    found = []
    hidden_size = int(model.get_input_embeddings().weight.shape[1])  # type: ignore[index]
    for call in calls:
        kind = _kind(model, call, names[call.module], encoder_names)
        projection = projections.get(call.module)
        found.append(
            Site(
                layer=counts[kind],
                kind=kind,
                module=names[call.module],
                hidden_width=hidden_size if projection is None else _width_after(projection),
                layer_module=_layer_of(names[call.module]),
                output_projection=None if projection is None else names[projection],
                num_heads=call.query.shape[1],
                num_key_value_heads=call.key.shape[1],
                key_width=call.key.shape[3],
                value_width=call.value.shape[3],
            )
        )
        counts[kind] += 1
    return Sites(
        attention=tuple(found),
        hidden_size=hidden_size,
        is_encoder_decoder=bool(model.config.is_encoder_decoder),
        positions=_position_kind(model, decoder_ids, calls),
        find_layers=find_layers,
    )


def _layer_of(module: str) -> str:
    """The nearest numbered piece that an attention module stands in."""
    parts = module.split(".")
    while not parts[-1].isdigit() and len(parts) > 1:
        parts.pop()
    return ".".join(parts)


def _width_after(projection: nn.Module) -> int:
    return int(projection.nf if isinstance(projection, Conv1D) else projection.weight.shape[0])  # type: ignore[index]


@contextmanager
def _watching_projections(
    model: nn.Module, calls: list[RecordedCall], projections: dict[nn.Module, nn.Module]
) -> Iterator[None]:
    """The linear layer whose input shares storage with attention's output is the output projection."""

    def look(module: nn.Module, args: Any) -> None:
        if not calls or not args or not isinstance(args[0], Tensor) or calls[-1].module in projections:
            return
        if args[0].untyped_storage().data_ptr() == calls[-1].output.untyped_storage().data_ptr():
            projections[calls[-1].module] = module

    handles = [m.register_forward_pre_hook(look) for m in model.modules() if isinstance(m, (nn.Linear, Conv1D))]
    with while_hooked(handles):
        yield


def _encoder_prefix(model: PreTrainedModel, names: dict[nn.Module, str]) -> str | None:
    if not model.config.is_encoder_decoder:
        return None
    return names[model.get_encoder()] + "."


def _kind(model: PreTrainedModel, call: RecordedCall, name: str, encoder_prefix: str | None) -> Kind:
    if encoder_prefix is not None:
        if name.startswith(encoder_prefix):
            return "encoder_self"
        return "cross" if call.key.shape[2] == ENCODER_TOKENS else "self"
    return "self" if getattr(call.module, "is_causal", True) else "encoder_self"


def _position_kind(model: PreTrainedModel, ids: Tensor, as_counted: list[RecordedCall]) -> PositionKind:
    """Asks the model itself, in exact comparisons that hold in every precision.

    Learned positions are added before the first layer, so they show in its values; rotary ones show in keys only.
    """
    if model.config.is_encoder_decoder:
        return "none"
    try:
        from_0, from_1 = (recorded(model, ids, ids, first) for first in (0, 1))
    except TypeError:
        return "none"
    counts_from_0 = all(torch.equal(a.key, b.key) for a, b in zip(as_counted, from_0, strict=True))
    listens = any(not torch.equal(a.key, b.key) for a, b in zip(from_0, from_1, strict=True))
    if not (counts_from_0 and listens):
        return "none"
    return "relative" if torch.equal(from_0[0].value, from_1[0].value) else "absolute"
