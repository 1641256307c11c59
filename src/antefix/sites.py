"""What a base offers to a prefix, found by looking: one recorded forward pass, no table of architectures.

A site is a place where something learned can act. Attention sites are `(layer, kind)` with kind `self`
(decoder, causal), `encoder_self` (an encoder, or a model that sees both ways) and `cross`. Heads and widths
are read off the recorded keys and values, layer by layer; nothing divides a hidden size by heads.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from antefix.attention.hook import RecordedCall, bare, recording
from antefix.errors import BaseModelError, PrefixError

Kind = Literal["self", "encoder_self", "cross"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PositionKind = Literal["relative", "absolute", "none"]

# Two unlike lengths, so that a cross-attention call shows itself by its number of keys.
_ENCODER_TOKENS, _DECODER_TOKENS = 3, 2


@dataclass(frozen=True, slots=True)
class Site:
    """One attention site. Keys of P slots here have the shape (num_key_value_heads, P, key_width)."""

    layer: int
    kind: Kind
    module: str
    """The attention module's path in the model."""
    num_heads: int
    num_key_value_heads: int
    key_width: int
    value_width: int
    hidden_width: int
    """Of the states that enter and leave its layer."""
    layer_module: str
    """The layer's path in the model: what it is given is the residual stream."""
    output_projection: str | None
    """The path of what multiplies attention's output, inside the attention module or behind it; None: not found."""

    @property
    def name(self) -> str:
        """The site's name in a kept prefix: `layers.3.self`."""
        return f"layers.{self.layer}.{self.kind}"


@dataclass(frozen=True, slots=True)
class Sites:
    """Everything a method must know of a base's shape."""

    attention: tuple[Site, ...]
    hidden_size: int
    is_encoder_decoder: bool
    positions: PositionKind
    """What moving all positions by a constant does: it turns keys alone (`relative`: rotary), it changes what
    enters the first layer (`absolute`: learned), or it cannot be asked for (`none`: the model takes no
    `position_ids`, or does not count them from 0)."""

    def of_kinds(self, kinds: tuple[Kind, ...] | None = None) -> tuple[Site, ...]:
        """The sites of these kinds, in call order; all of them for None."""
        return tuple(s for s in self.attention if kinds is None or s.kind in kinds)

    @property
    def is_causal(self) -> bool:
        """Whether tokens see what stands before them, and nothing else."""
        return self.kinds == ("self",)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds this base has."""
        return tuple(k for k in KINDS if any(s.kind == k for s in self.attention))


_found: weakref.WeakKeyDictionary[nn.Module, Sites] = weakref.WeakKeyDictionary()


def sites_of_kinds(sites: Sites, kinds: tuple[Kind, ...]) -> tuple[Site, ...]:
    """The sites of these kinds. Raises PrefixError where the base has none."""
    chosen = sites.of_kinds(kinds)
    if not chosen:
        raise PrefixError(f"the base has no site of kind {', '.join(kinds)}: it has {', '.join(sites.kinds)}")
    return chosen


def find_sites(model: nn.Module) -> Sites:
    """The sites of a model, found by a recorded forward pass of two tokens and remembered for the model.

    Raises BaseModelError where no attention call passes transformers' attention registry.
    """
    if model not in _found:
        if not isinstance(model, PreTrainedModel):
            raise BaseModelError(f"{type(model).__name__} is no transformers model: load it with antefix.load_base")
        _found[model] = _look(model)
    return _found[model]


@torch.no_grad()
def record_text(
    model: PreTrainedModel, input_ids: Tensor, first_position: int | None = None
) -> list[tuple[Site, RecordedCall]]:
    """Keys and values of a text at every site, as attention gets them.

    input_ids: 1, T. first_position: the position of the first token (may be negative for rotary models);
    None: as the model counts. An encoder-decoder model reads the text in its encoder and in its decoder.
    """
    sites = find_sites(model)
    calls = _recorded(model, input_ids, input_ids, first_position)
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
    try:
        with in_eval_mode(model), bare(), recording(model) as calls:
            model.base_model(
                inputs_embeds=rows_PC[None].to(model.dtype),
                attention_mask=torch.ones(1, length, dtype=torch.long, device=rows_PC.device),
                position_ids=torch.arange(first_position, first_position + length, device=rows_PC.device)[None],
                use_cache=False,
            )
    finally:
        for handle in handles:
            handle.remove()
    return list(zip(find_sites(model).attention, calls, strict=True))


@torch.no_grad()
def first_states(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """What rows before a text stand beside, (1, T, C): the embeddings of a causal base, the input of an encoder's first
    layer."""
    encoder = find_sites(model).of_kinds(("encoder_self",))
    if not encoder:
        embedded: Tensor = model.get_input_embeddings()(input_ids)
        return embedded
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])

    handle = model.get_submodule(encoder[0].layer_module).register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with bare():
            _recorded(model, input_ids, input_ids, None)
    finally:
        handle.remove()
    return found[0]


@torch.no_grad()
def read_one_token(model: PreTrainedModel) -> None:
    """A forward pass of one token at position 0."""
    ids = _some_ids(model, 1)
    _recorded(model, ids, ids, None)


@torch.no_grad()
def _look(model: PreTrainedModel) -> Sites:
    encoder_ids, decoder_ids = (_some_ids(model, count) for count in (_ENCODER_TOKENS, _DECODER_TOKENS))
    projections: dict[nn.Module, nn.Module] = {}
    calls = _recorded(model, encoder_ids, decoder_ids, None, projections)
    if not calls:
        raise BaseModelError(
            f"{type(model).__name__} cannot carry a prefix: none of its attention passes transformers' attention "
            "interface (AttentionInterface); use a model whose file calls ALL_ATTENTION_FUNCTIONS"
        )
    names = {module: name for name, module in model.named_modules()}
    if len({call.module for call in calls}) < len(calls):
        raise BaseModelError(
            f"{type(model).__name__} cannot carry a prefix: its layers share attention modules, so that slots could "
            "not tell them apart; use a model without shared layers"
        )
    encoder_names = _encoder_prefix(model, names)
    counts: dict[Kind, int] = dict.fromkeys(KINDS, 0)
    found = []
    hidden_size = int(model.get_input_embeddings().weight.shape[1])  # type: ignore[index]
    for call in calls:
        kind = _kind(model, call, names[call.module], encoder_names)
        projection = projections.get(call.module)
        found.append(
            Site(
                layer=counts[kind],
                kind=kind,
                module=names[call.module],
                hidden_width=hidden_size if projection is None else _width_after(projection),
                layer_module=_layer_of(names[call.module]),
                output_projection=None if projection is None else names[projection],
                num_heads=call.query.shape[1],
                num_key_value_heads=call.key.shape[1],
                key_width=call.key.shape[3],
                value_width=call.value.shape[3],
            )
        )
        counts[kind] += 1
    return Sites(
        attention=tuple(found),
        hidden_size=hidden_size,
        is_encoder_decoder=bool(model.config.is_encoder_decoder),
        positions=_position_kind(model, decoder_ids, calls),
    )


def _some_ids(model: PreTrainedModel, count: int) -> Tensor:
    """Tokens to look with; none of them padding, which some models count positions by."""
    ids = [i for i in range(count + 1) if i != getattr(model.config.get_text_config(), "pad_token_id", None)]
    return torch.tensor([ids[:count]], device=model.device)


def _layer_of(module: str) -> str:
    """The nearest numbered piece that an attention module stands in."""
    parts = module.split(".")
    while not parts[-1].isdigit() and len(parts) > 1:
        parts.pop()
    return ".".join(parts)


def _width_after(projection: nn.Module) -> int:
    return int(projection.nf if isinstance(projection, Conv1D) else projection.weight.shape[0])  # type: ignore[index]


def _recorded(
    model: PreTrainedModel,
    encoder_ids: Tensor,
    decoder_ids: Tensor,
    first_position: int | None,
    projections: dict[nn.Module, nn.Module] | None = None,
) -> list[RecordedCall]:
    """projections: filled with the module that multiplies the output of every attention module."""
    inputs = {"input_ids": decoder_ids, "attention_mask": torch.ones_like(decoder_ids)}
    if model.config.is_encoder_decoder:
        inputs = {
            "input_ids": encoder_ids,
            "attention_mask": torch.ones_like(encoder_ids),
            "decoder_input_ids": decoder_ids,
        }
    elif first_position is not None:
        length = decoder_ids.shape[1]
        inputs["position_ids"] = torch.arange(first_position, first_position + length, device=decoder_ids.device)[None]
    handles: list[RemovableHandle] = []
    try:
        with in_eval_mode(model), recording(model) as calls:
            if projections is not None:
                handles += _watch_projections(model, calls, projections)
            model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module as in evaluation: without dropout, without activation checkpointing."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _watch_projections(
    model: nn.Module, calls: list[RecordedCall], projections: dict[nn.Module, nn.Module]
) -> list[RemovableHandle]:
    """Who is given the memory that attention's output lies in multiplies it."""

    def look(module: nn.Module, args: Any) -> None:
        if not calls or not args or not isinstance(args[0], Tensor) or calls[-1].module in projections:
            return
        if args[0].untyped_storage().data_ptr() == calls[-1].output.untyped_storage().data_ptr():
            projections[calls[-1].module] = module

    return [m.register_forward_pre_hook(look) for m in model.modules() if isinstance(m, (nn.Linear, Conv1D))]


def _encoder_prefix(model: PreTrainedModel, names: dict[nn.Module, str]) -> str | None:
    if not model.config.is_encoder_decoder:
        return None
    return names[model.get_encoder()] + "."


def _kind(model: PreTrainedModel, call: RecordedCall, name: str, encoder_prefix: str | None) -> Kind:
    if encoder_prefix is not None:
        if name.startswith(encoder_prefix):
            return "encoder_self"
        return "cross" if call.key.shape[2] == _ENCODER_TOKENS else "self"
    return "self" if getattr(call.module, "is_causal", True) else "encoder_self"


def _position_kind(model: PreTrainedModel, ids: Tensor, as_counted: list[RecordedCall]) -> PositionKind:
    """Asks the model itself, in exact comparisons that hold in every precision.

    Learned positions are added before the first layer, so they show in its values; rotary ones show in keys only.
    """
    if model.config.is_encoder_decoder:
        return "none"
    try:
        from_0, from_1 = (_recorded(model, ids, ids, first) for first in (0, 1))
    except TypeError:
        return "none"
    counts_from_0 = all(torch.equal(a.key, b.key) for a, b in zip(as_counted, from_0, strict=True))
    listens = any(not torch.equal(a.key, b.key) for a, b in zip(from_0, from_1, strict=True))
    if not (counts_from_0 and listens):
        return "none"
    return "relative" if torch.equal(from_0[0].value, from_1[0].value) else "absolute"
