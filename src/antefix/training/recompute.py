"""Activation checkpointing on a frozen base: less memory, a third more time, the same gradients.

transformers recomputes in train mode only, so the base's layers are put into train mode with every dropout at 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

from antefix.errors import TrainingError

_DROPOUTS = ("p", "dropout", "attention_dropout", "activation_dropout", "layerdrop", "dropout_prob", "dropout_p")


@contextmanager
def recomputing(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the base's layers recompute their activations in the backward pass.

    Raises TrainingError for a base that transformers cannot do this with.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        model.activation_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise TrainingError(f"activation_checkpointing = true, but {type(model).__name__} has none: {error}") from error
    before = _silence_dropouts(model)
    for module in _base_modules(model):
        module.training = True
    try:
        yield
    finally:
        model.activation_checkpointing_disable()  # type: ignore[no-untyped-call]
        for module, mode in modes.items():
            module.training = mode
        for module, name, value in before:
            setattr(module, name, value)


def _silence_dropouts(model: nn.Module) -> list[tuple[nn.Module, str, float]]:
    found = []
    for module in _base_modules(model):
        for name in _DROPOUTS:
            value = module.__dict__.get(name)
            if isinstance(value, float) and value > 0:
                found.append((module, name, value))
                setattr(module, name, 0.0)
    return found


def _base_modules(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if not name.startswith("antefix")]
