"""What attention makes of a text, or of rows in its place, at every site of a base.

Axes: P tokens of the text, C width of hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from antefix.attention.hook import RecordedCall, bare, recording
from antefix.hooks import while_hooked
from antefix.sites.find import find_sites
from antefix.sites.reading import in_eval_mode, recorded, some_ids
from antefix.sites.site import Site


@torch.no_grad()
def record_text(
    model: PreTrainedModel, input_ids: Tensor, first_position: int | None = None
) -> list[tuple[Site, RecordedCall]]:
    """Keys and values of a text at every site, as attention gets them.

    input_ids: 1, T. first_position: the position of the first token (may be negative for rotary models);
    None: as the model counts. An encoder-decoder model reads the text in its encoder and in its decoder.
    """
    sites = find_sites(model)
    calls = recorded(model, input_ids, input_ids, first_position)
    return list(zip(sites.attention, calls, strict=True))


def record_rows(
    model: PreTrainedModel, rows_PC: Tensor, first_position: int, added: Mapping[str, Tensor]
) -> list[tuple[Site, RecordedCall]]:
    """The same of rows (P, C) in the place of embeddings, for a causal base; differentiable.

    added: by the path of a layer, (P, C), added to the rows at its input.
    """

    def adder(offset_PC: Tensor) -> Any:
        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            if args:
                return (args[0] + offset_PC.to(args[0].dtype), *args[1:]), kwargs
            states = kwargs["hidden_states"]
            return args, {**kwargs, "hidden_states": states + offset_PC.to(states.dtype)}

        return add

    modules, length = dict(model.named_modules()), len(rows_PC)
    handles = [modules[p].register_forward_pre_hook(adder(o), with_kwargs=True) for p, o in added.items()]
    with while_hooked(handles), in_eval_mode(model), bare(), recording(model) as calls:
        model.base_model(
            inputs_embeds=rows_PC[None].to(model.dtype),
            attention_mask=torch.ones(1, length, dtype=torch.long, device=rows_PC.device),
            position_ids=torch.arange(first_position, first_position + length, device=rows_PC.device)[None],
            use_cache=False,
        )
    return list(zip(find_sites(model).attention, calls, strict=True))


@torch.no_grad()
def first_states(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """What rows before a text stand beside, (1, T, C): the embeddings of a causal base, the input of an encoder's first
    layer."""
    encoder = find_sites(model).of_kinds(("encoder_self",))
    if encoder:
        return layer_inputs(model, input_ids)[encoder[0].name][None]
    embedded: Tensor = model.get_input_embeddings()(input_ids)
    return embedded


@torch.no_grad()
def layer_inputs(model: PreTrainedModel, input_ids: Tensor) -> dict[str, Tensor]:
    """What every layer of a causal base, or of an encoder, is given of a text: site name -> (T, C)."""
    sites = find_sites(model)
    found: dict[str, Tensor] = {}

    def keeper(name: str) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[name] = (args[0] if args else kwargs["hidden_states"])[0]

        return keep

    chosen = sites.of_kinds(("self",) if sites.is_causal else ("encoder_self",))
    layers = [(model.get_submodule(site.layer_module), keeper(site.name)) for site in chosen]
    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer, keep in layers]
    with while_hooked(handles), bare():
        recorded(model, input_ids, input_ids, None)
    return found


@torch.no_grad()
def read_one_token(model: PreTrainedModel) -> None:
    """A forward pass of one token at position 0."""
    ids = some_ids(model, 1)
    recorded(model, ids, ids, None)
