"""A prefix written into the weights of a copy of its base, where that is exact.

Scales, biases and low-rank matrices at linear layers are, and trained weights; the copy then computes what the base
with the prefix computes, at the base's own cost. Slots and networks with a bend are not.

Axes: I width that a layer takes, O width that it gives, R width of a network.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from antefix.attachment import attachments
from antefix.base import Base
from antefix.errors import PrefixError
from antefix.methods.base import MethodModule
from antefix.parts.linear import LinearPart
from antefix.prefix import Prefix
from antefix.quantised import is_quantised

_MERGED = "antefix_merged"
"""Where a model says that a prefix was written into it."""


@torch.no_grad()
def merged(base: Base, prefix: Prefix) -> Base:
    """A copy of the base with the prefix in its weights, in the base's precision.

    Raises PrefixError for a prefix that cannot be written into weights, for a base that has one in it already, and
    where a layer would need a bias that it does not have; WrongBaseError for a prefix of another base.
    """
    if _MERGED in base.model.__dict__:
        raise PrefixError("a prefix was written into this base already: take the base as it was loaded")
    if is_quantised(base.model):
        raise PrefixError("the base's weights are of eight bits: load it in float32 to write a prefix into them")
    if attachments(base.model):
        raise PrefixError("something is attached to the base: detach it first")
    module = prefix.module(base.model)
    _check_is_exact(module, prefix.card.method)
    model = copy.deepcopy(base.model)
    every = dict(model.named_parameters())
    for name, weight in module.weights().items():
        every[name].copy_(weight)
    for name, part in module.linear_parts().items():
        _write(model.get_submodule(name), part, name)
    model.__dict__[_MERGED] = True
    return Base(model, base.tokenizer, f"{base.name} + {prefix.card.method}")


def _check_is_exact(module: MethodModule, method: str) -> None:
    parts = module.linear_parts().values()
    bent = any(
        (reads, activation) != ("input", "identity") or network.up_bias_O is not None or network.down_bias_R is not None
        for part in parts
        for reads, activation, network in part.networks
    )
    tokens = module.encoder_rows(), module.new_tokens(), module.inserted()
    if module.slots() or module.branches() or bent or any(one is not None for one in tokens):
        raise PrefixError(
            f"{method} cannot be written into weights: only scales, biases and low-rank matrices of linear layers can"
        )
    if module.head is not None and module.head.kept():
        raise PrefixError("a learned label head cannot be written into the base: attach the prefix instead")


def _write(layer: nn.Module, part: LinearPart, name: str) -> None:
    weight, bias = layer.weight, getattr(layer, "bias", None)
    assert isinstance(weight, nn.Parameter)
    made = weight.float().T if isinstance(layer, Conv1D) else weight.float()
    if part.input_scale_I is not None:
        made = made * part.input_scale_I
    if part.output_scale_O is not None:
        made = made * (part.output_scale_O if made.ndim == 1 else part.output_scale_O[:, None])
    for _, _, network in part.networks:  # `_check_is_exact` saw that they are low-rank matrices
        made = made + network.up_OR @ network.down_RI
    weight.copy_(made.T if isinstance(layer, Conv1D) else made)
    if isinstance(bias, nn.Parameter):
        scaled = bias.float() if part.output_scale_O is None else bias.float() * part.output_scale_O
        bias.copy_(scaled if part.bias_O is None else scaled + part.bias_O)
    elif part.bias_O is not None:
        raise PrefixError(f"{name} has no bias that one could be written into: attach the prefix instead")
