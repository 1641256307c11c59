"""Bases whose frozen weights are whole numbers of eight bits: a quarter of float32's memory.

Weights alone are quantised (torchao's int8, symmetric, a scale for every row); they are multiplied in the precision of
the states. Gradients flow through them to what is learned. A quantised base keeps the fingerprint of the weights it was
made from: a prefix trained on one can be attached to the other, at the loss that the rounding costs.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from antefix.errors import BaseModelError
from antefix.fingerprint import keep_fingerprint
from antefix.products import by_torch

_ATTRIBUTE = "antefix_quantised"


def is_quantised(model: nn.Module) -> bool:
    """Whether `quantise` was here."""
    return _ATTRIBUTE in model.__dict__


def quantise(model: PreTrainedModel) -> None:
    """Replace the weights of all linear layers but the output head's.

    Raises BaseModelError without torchao, and for a base that has no such layers (GPT-2 has its own kind).
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise BaseModelError("dtype 'int8' needs torchao: pip install 'antefix[int8]'") from error
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    by_torch(model)
    chosen = {m for m in model.modules() if type(m) is nn.Linear and m is not head}
    if not chosen:
        raise BaseModelError(f"dtype 'int8': {type(model).__name__} has no linear layers to quantise; use native")
    keep_fingerprint(model)
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: module in chosen)
    model.requires_grad_(False)
    model.__dict__[_ATTRIBUTE] = True
