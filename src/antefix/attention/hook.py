"""The one function through which a transformers model reaches a prefix.

transformers looks its attention up by name, in one registry for the function and in another for the mask
that goes with it. For every implementation a base may use, a name of ours stands in both: `antefix_sdpa`,
`antefix_eager`. The function asks the attention module for the slots attached to it; where there are none
it makes the base's own call, so that a model without a prefix stays bit-equal to the base. Nothing is put
into the cache, the mask or the token ids, and no method of the model is replaced.

Axes: B rows, T queries, S keys, H query heads, G key/value heads, D key width, E value width, C width of hidden states.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from antefix.attention.attend import attend, attend_partial
from antefix.attention.branch import Acting, Attention, Call, acted
from antefix.attention.forest import Forest, forest_of, is_forest
from antefix.attention.partial import KeySet, Mask, Partial, Scores
from antefix.errors import BaseModelError

SUPPORTED_IMPLEMENTATIONS = ("sdpa", "eager")
_PREFIX = "antefix_"
_SITE_ATTRIBUTE = "antefix_at_site"
_PREPARED_ATTRIBUTE = "antefix_prepared"
_FOREIGN_TERMS = ("sinks", "indices", "block_indices")
"""What a few models hand their attention that changes its scores in ways `Scores` does not know."""


class AtSite(Protocol):
    """What an attachment puts at an attention module."""

    def key_sets(self, num_rows: int) -> list[KeySet]:
        """The slots that the rows see, as precise as they are kept; empty when no row carries a prefix."""
        ...

    def is_target(self, num_queries: int) -> Tensor | None:
        """Which queries are a target's, (B or 1, T), None for all; asked where some slots are for targets alone."""
        ...

    def acting(self, num_rows: int, forest: Forest | None) -> Sequence[Acting]:
        """The branches of the rows, or of a forest's trees."""
        ...

    def call(self, query: Tensor, scores: Scores, tokens: Callable[[], Partial], memory: dict[str, Tensor]) -> Call:
        """What a branch is asked with."""
        ...

    def seen(self, mask: Tensor | None, query: Tensor) -> Tensor | None:
        """The mask that these queries need."""
        ...

    def keep_residual(self, residual_BTC: Tensor | None) -> None:
        """What is added after the output projection of this call."""
        ...


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """One attention call of a recorded forward pass: key and value as attention got them (B, G, S, D)."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    """What the model gets back: (B, T, H, E)."""


_recording: ContextVar[list[RecordedCall] | None] = ContextVar("antefix_recording", default=None)
_projecting: ContextVar[bool] = ContextVar("antefix_projecting", default=False)
_is_bare: ContextVar[bool] = ContextVar("antefix_bare", default=False)


def put_at_site(module: nn.Module, at_site: AtSite | None) -> None:
    """Attach to an attention module (None: detach)."""
    if at_site is None:
        module.__dict__.pop(_SITE_ATTRIBUTE, None)
    else:
        module.__dict__[_SITE_ATTRIBUTE] = at_site


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


@contextmanager
def bare() -> Iterator[None]:
    """Inside, models are what they are without what is attached to them."""
    token = _is_bare.set(True)
    try:
        yield
    finally:
        _is_bare.reset(token)


def is_bare() -> bool:
    """Whether what is attached is out of work; see `bare`."""
    return _is_bare.get()


class _Projected(Exception):  # noqa: N818 (no error: it ends a call whose rest nobody needs)
    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.key, self.value = key, value


def projected(
    model: nn.Module, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Keys and values (B, G, S, D) that an attention module makes of what it is given, fused projections included.

    The call ends where it reaches the registry; gradients flow to what was given.
    """
    token = _projecting.set(True)
    try:
        with routed(model):
            module(*args, **kwargs)
    except _Projected as end:
        return end.key, end.value
    finally:
        _projecting.reset(token)
    raise BaseModelError(f"{type(module).__name__} reached no attention")


def _attention(base_name: str) -> Callable[..., Any]:
    def antefix_attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if _projecting.get():
            raise _Projected(key, value)
        at_site: AtSite | None = None if _is_bare.get() else module.__dict__.get(_SITE_ATTRIBUTE)
        if attention_mask is not None and is_forest(attention_mask):
            found = _over_forest(module, query, KeySet(key, value), forest_of(attention_mask), at_site, kwargs)
        else:
            found = _over_rows(base_name, module, query, key, value, attention_mask, at_site, kwargs)
        if (calls := _recording.get()) is not None:
            calls.append(RecordedCall(module, query, key, value, found[0]))
        return found

    return antefix_attention


def _over_rows(
    base_name: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
    at_site: AtSite | None, kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Rows of queries with an ordinary mask."""
    if at_site is not None:
        mask = at_site.seen(mask, query)
    sets = [] if at_site is None else at_site.key_sets(query.shape[0])
    acting = () if at_site is None else at_site.acting(query.shape[0], None)
    if at_site is not None and any(s.for_targets for s in sets):
        is_target = at_site.is_target(query.shape[2])
        sets = [s.seen_by(is_target) for s in sets]

    def base() -> tuple[Tensor, Tensor | None]:
        return _base_function(base_name, module)(module, query, key, value, mask, **kwargs)  # type: ignore[no-any-return]

    if not sets and not acting:
        return base()
    tokens = _tokens(module, query, key, value, mask, kwargs)
    scores = _scores(module, query, tokens, kwargs)
    if not acting or at_site is None:
        return _returned(attend(query, tokens, sets, scores))
    attention = Attention(
        lambda: attend(query, tokens, sets, scores) if sets else base()[0].transpose(1, 2),
        lambda: attend_partial(query, tokens, sets, scores),
    )
    return _with_effects(at_site, attention, acting, query, scores, lambda: attend_partial(query, tokens, [], scores))


def _over_forest(
    module: nn.Module, query: Tensor, tokens: KeySet, forest: Forest, at_site: AtSite | None, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Packed rows."""
    planted = [forest.planted[module]] if module in forest.planted else []
    sets = [*([] if at_site is None else at_site.key_sets(forest.num_trees)), *planted]
    acting = () if at_site is None else at_site.acting(forest.num_trees, forest)
    scores = _scores(module, query, tokens, kwargs)
    if not acting or at_site is None:
        return _returned(forest.attend(query, tokens, sets, scores))
    attention = Attention(
        lambda: forest.attend(query, tokens, sets, scores), lambda: forest.partial(query, tokens, sets, scores)
    )
    return _with_effects(
        at_site, attention, acting, query, scores, lambda: forest.partial(query, tokens, planted, scores)
    )


def _with_effects(
    at_site: AtSite, attention: Attention, acting: Sequence[Acting], query: Tensor, scores: Scores,
    tokens: Callable[[], Partial],
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    of_tokens = cache(tokens)
    out, residual = acted(attention, acting, lambda memory: at_site.call(query, scores, of_tokens, memory))
    at_site.keep_residual(residual)
    return _returned(out)


def _returned(out_BHTE: Tensor) -> tuple[Tensor, None]:
    return out_BHTE.transpose(1, 2).contiguous(), None


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
    once and kept at the tensor, as long as that lives. The version tells a mask that was written into; tensors of
    inference mode have none, so theirs are made every time."""
    if mask.is_inference():
        return Mask.of(mask[..., :num_keys], dtype)
    made_for = (mask._version, num_keys, dtype)
    known: tuple[Any, Mask] | None = mask.__dict__.get(_PREPARED_ATTRIBUTE)
    if known is not None and known[0] == made_for:
        return known[1]
    made = Mask.of(mask[..., :num_keys], dtype)
    mask.__dict__[_PREPARED_ATTRIBUTE] = (made_for, made)
    return made


for _name in SUPPORTED_IMPLEMENTATIONS:
    AttentionInterface.register(_PREFIX + _name, _attention(_name))
    AttentionMaskInterface.register(_PREFIX + _name, AttentionMaskInterface._global_mapping[_name])  # type: ignore[arg-type]
