"""The last hidden states of a model, without its output head's work."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from antefix.hooks import while_hooked


def last_hidden_states(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """(B, T, C), of a forward pass of the whole model, what is attached to it included; its head gets a token a row."""
    kept: list[Tensor] = []
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    # OPT's head asks its decoder, not the `base_model` around that.
    body = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model  # type: ignore[no-untyped-call]
    handles = [body.register_forward_hook(lambda module, args, output: kept.append(output[0]))]
    if head is not None:
        handles.append(head.register_forward_pre_hook(lambda module, args: (args[0][..., :1, :],)))
    with while_hooked(handles):
        model(**inputs)
    return kept[-1]  # a pass inside this one, of rows before a text, is over before it
