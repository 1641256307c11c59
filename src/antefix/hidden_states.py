"""What labels are read from: the last hidden states of a model, and its logits at few places.

Axes: B rows, T tokens, C width of hidden states, N places, V words.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from antefix.hooks import while_hooked


def states_and_logits(model: PreTrainedModel, inputs: dict[str, Any], places_N: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T, C) and (N, V), of a forward pass of the whole model, what is attached to it included.

    places_N: of all B T tokens, those whose logits are wanted; the output head works at no others. There may be none,
    as in a model without such a head: logits are (0, 0) then.
    """
    kept: list[Tensor] = []
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    # OPT's head asks its decoder, not the `base_model` around that.
    body = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model  # type: ignore[no-untyped-call]
    handles = [body.register_forward_hook(lambda module, args, output: kept.append(output[0]))]
    worked_at = places_N if len(places_N) else torch.zeros(1, dtype=torch.long)
    if head is not None:
        handles.append(head.register_forward_pre_hook(lambda module, args: (args[0].flatten(0, -2)[worked_at],)))
    with while_hooked(handles):
        output = model(**inputs)
    # Logits are the model's own, not the head's: some bases cap or scale what their head gives.
    logits_NV = output.logits.flatten(0, -2) if len(places_N) else torch.empty(0, 0)
    return kept[-1], logits_NV  # a pass inside this one, of rows before a text, is over before it
