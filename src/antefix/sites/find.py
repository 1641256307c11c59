"""The sites of a model, remembered for it."""

from __future__ import annotations

import weakref
from functools import partial

from torch import nn
from transformers import PreTrainedModel

from antefix.errors import BaseModelError
from antefix.sites.attention import look_at_attention
from antefix.sites.layers import look_at_layers
from antefix.sites.site import Layers, Sites

_found: weakref.WeakKeyDictionary[nn.Module, Sites] = weakref.WeakKeyDictionary()


def find_sites(model: nn.Module) -> Sites:
    """The sites of a model, found by a recorded forward pass of two tokens and remembered for the model.

    Raises BaseModelError where no attention call passes transformers' attention registry.
    """
    if model not in _found:
        if not isinstance(model, PreTrainedModel):
            raise BaseModelError(f"{type(model).__name__} is no transformers model: load it with antefix.load_base")
        _found[model] = look_at_attention(model, partial(_layers_of, weakref.ref(model)))
    return _found[model]


def _layers_of(model: weakref.ref[PreTrainedModel]) -> Layers:
    alive = model()
    if alive is None:
        raise BaseModelError("the model whose sites these are is gone: keep it while its sites are asked for")
    return look_at_layers(alive, _found[alive].attention)
