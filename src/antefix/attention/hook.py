"""The one function through which a transformers model reaches a prefix.

transformers looks its attention up by name, in one registry for the function and in another for the mask
that goes with it. For every implementation a base may use, a name of ours stands in both: `antefix_sdpa`,
`antefix_eager`. The function asks the attention module for the slots attached to it; where there are none
it makes the base's own call, so that a model without a prefix stays bit-equal to the base. Nothing is put
into the cache, the mask or the token ids, and no method of the model is replaced.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from antefix.attention.attend import attend
from antefix.attention.forest import forest_of, is_forest
from antefix.attention.partial import KeySet, Mask, Scores
from antefix.errors import BaseModelError

SUPPORTED_IMPLEMENTATIONS = ("sdpa", "eager")
_PREFIX = "antefix_"
_SITE_ATTRIBUTE = "antefix_slots"
_PREPARED_ATTRIBUTE = "antefix_prepared"
_FOREIGN_TERMS = ("sinks", "indices", "block_indices")
"""What a few models hand their attention that changes its scores in ways `Scores` does not know."""


class SiteSlots(Protocol):
    """What an attachment puts at an attention module."""

    def key_sets(self, num_rows: int) -> list[KeySet]:
        """The slots that the rows see, as precise as they are kept; empty when no row carries a prefix."""
        ...

    def is_target(self, num_queries: int) -> Tensor | None:
        """Which queries are a target's, (B or 1, T), None for all; asked where some slots are for targets alone."""
        ...


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """One attention call of a recorded forward pass: key and value as attention got them (B, G, S, D)."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor


_recording: ContextVar[list[RecordedCall] | None] = ContextVar("antefix_recording", default=None)


def put_slots(module: nn.Module, slots: SiteSlots | None) -> None:
    """Attach slots to an attention module (None: detach)."""
    if slots is None:
        module.__dict__.pop(_SITE_ATTRIBUTE, None)
    else:
        module.__dict__[_SITE_ATTRIBUTE] = slots


class HookedModel:
    """Routes a model's attention through ours, and back. Uses may overlap: who finds it done has nothing to undo."""

    def __init__(self, model: nn.Module) -> None:
        self._configs: dict[int, Any] = {}
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                self._configs[id(module.config)] = module.config
        if not self._configs:
            raise BaseModelError(f"{type(model).__name__} is no transformers model: load it with antefix.load_base")

    def route(self) -> list[tuple[Any, str]]:
        """Point every config at our names; returns what is to be put back, empty if that was done before."""
        before = []
        for config in self._configs.values():
            name = str(config._attn_implementation)
            if name.startswith(_PREFIX):
                continue
            if name not in SUPPORTED_IMPLEMENTATIONS:
                raise BaseModelError(
                    f"the model uses attention '{name}', a prefix needs one of {', '.join(SUPPORTED_IMPLEMENTATIONS)}: "
                    "load it with attn_implementation='sdpa'"
                )
            before.append((config, name))
        for config, name in before:
            config._attn_implementation = _PREFIX + name
        return before

    @property
    def is_routed(self) -> bool:
        """Whether attention goes through ours."""
        return all(str(config._attn_implementation).startswith(_PREFIX) for config in self._configs.values())

    @staticmethod
    def restore(before: list[tuple[Any, str]]) -> None:
        """Give every config its own implementation back."""
        for config, name in before:
            config._attn_implementation = name


@contextmanager
def routed(model: nn.Module) -> Iterator[None]:
    """Attention goes through ours for the length of a block: what a forest needs where no prefix is attached."""
    hooked = HookedModel(model)
    before = hooked.route()
    try:
        yield
    finally:
        hooked.restore(before)


@contextmanager
def recording(model: nn.Module) -> Iterator[list[RecordedCall]]:
    """Collects every attention call made inside, in call order. Slots that are attached stay at work."""
    calls: list[RecordedCall] = []
    token = _recording.set(calls)
    try:
        with routed(model):
            yield calls
    finally:
        _recording.reset(token)


def _attention(base_name: str) -> Callable[..., Any]:
    def antefix_attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        calls = _recording.get()
        if calls is not None:
            calls.append(RecordedCall(module, query, key, value))
        slots: SiteSlots | None = module.__dict__.get(_SITE_ATTRIBUTE)
        if attention_mask is not None and is_forest(attention_mask):
            forest = forest_of(attention_mask)
            tokens = KeySet(key, value)
            sets = [] if slots is None else slots.key_sets(forest.num_trees)
            if module in forest.planted:
                sets = [*sets, forest.planted[module]]
            out = forest.attend(query, tokens, sets, _scores(module, query, tokens, kwargs))
            return out.transpose(1, 2).contiguous(), None
        sets = [] if slots is None else slots.key_sets(query.shape[0])
        if slots is not None and any(s.for_targets for s in sets):
            is_target = slots.is_target(query.shape[2])
            sets = [s.seen_by(is_target) for s in sets]
        if not sets:
            base = _base_function(base_name, module)
            return base(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
        tokens = _tokens(module, query, key, value, attention_mask, kwargs)
        out = attend(query, tokens, sets, _scores(module, query, tokens, kwargs))
        return out.transpose(1, 2).contiguous(), None

    return antefix_attention


def _base_function(name: str, module: nn.Module) -> Callable[..., Any]:
    if name in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[name]  # type: ignore[no-any-return]
    # "eager" is in no registry: every modelling file brings its own.
    files = (sys.modules[cls.__module__] for cls in type(module).__mro__)
    return next(f.eager_attention_forward for f in files if hasattr(f, "eager_attention_forward"))  # type: ignore[no-any-return]


def _scores(module: nn.Module, query: Tensor, tokens: KeySet, kwargs: dict[str, Any]) -> Scores:
    for name in _FOREIGN_TERMS:
        if kwargs.get(name) is not None:
            raise BaseModelError(
                f"{type(module).__name__} cannot carry a prefix: its attention takes '{name}', which the merge with "
                "slots does not know; use another base"
            )
    scaling, bias = kwargs.get("scaling"), kwargs.get("position_bias")
    return Scores(
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        softcap=kwargs.get("softcap"),
        position_bias=None if bias is None else bias[..., : tokens.key_BGSD.shape[2]],
        sink_logits_H=kwargs.get("s_aux"),
        dropout=float(kwargs.get("dropout") or 0.0),
    )


def _tokens(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> KeySet:
    if mask is not None:
        return KeySet(key, value, _prepared_mask(mask, key.shape[2], query.dtype))
    is_causal = kwargs.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    num_queries = query.shape[2]
    if not (is_causal and num_queries > 1):
        return KeySet(key, value)
    # A static cache that is being filled for the first time is longer than what has been seen.
    return KeySet(key[:, :, :num_queries], value[:, :, :num_queries], is_causal=True)


def _prepared_mask(mask: Tensor, num_keys: int, dtype: torch.dtype) -> Mask:
    """The mask as attention takes it. All layers of one kind get the same tensor in a forward pass, so this is made
    once and kept at the tensor, as long as that lives. The version tells a mask that was written into."""
    made_for = (None if mask.is_inference() else mask._version, num_keys, dtype)
    known: tuple[Any, Mask] | None = mask.__dict__.get(_PREPARED_ATTRIBUTE)
    if known is not None and known[0] == made_for:
        return known[1]
    made = Mask.of(mask[..., :num_keys], dtype)
    mask.__dict__[_PREPARED_ATTRIBUTE] = (made_for, made)
    return made


for _name in SUPPORTED_IMPLEMENTATIONS:
    AttentionInterface.register(_PREFIX + _name, _attention(_name))
    AttentionMaskInterface.register(_PREFIX + _name, AttentionMaskInterface._global_mapping[_name])  # type: ignore[arg-type]
