"""What labels are read from: the last hidden states of a model, and its logits at one token of every row.

Axes: B rows, T tokens, C width of hidden states, V words.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from antefix.hooks import while_hooked


def states_and_logits(model: PreTrainedModel, inputs: dict[str, Any], place_B: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T, C) and (B, V), of a forward pass of the whole model, what is attached to it included.

    place_B: the token of each row whose logits are wanted; the output head works at no other. A model without such a
    head has no logits: (B, 0).
    """
    kept: list[Tensor] = []
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    # OPT's head asks its decoder, not the `base_model` around that.
    body = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model  # type: ignore[no-untyped-call]
    handles = [body.register_forward_hook(lambda module, args, output: kept.append(output[0]))]
    if head is not None:
        rows_B = torch.arange(len(place_B), device=place_B.device)
        handles.append(head.register_forward_pre_hook(lambda module, args: (args[0][rows_B, place_B][:, None],)))
    with while_hooked(handles):
        output = model(**inputs)
    states_BTC = kept[-1]  # a pass inside this one, of rows before a text, is over before it
    # Logits are the model's own, not the head's: some bases cap or scale what their head gives.
    return states_BTC, states_BTC.new_empty(len(place_B), 0) if head is None else output.logits[:, 0]
