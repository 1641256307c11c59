"""What a base offers to a prefix, found by looking: one recorded forward pass, no table of architectures.

A site is a place where something learned can act. Attention sites are `(layer, kind)` with kind `self`
(decoder, causal), `encoder_self` (an encoder, or a model that sees both ways) and `cross`. Heads and widths
are read off the recorded keys and values, layer by layer; nothing divides a hidden size by heads.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from antefix.attention.hook import RecordedCall, recording
from antefix.errors import BaseModelError

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
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds this base has."""
        return tuple(k for k in KINDS if any(s.kind == k for s in self.attention))


_found: weakref.WeakKeyDictionary[nn.Module, Sites] = weakref.WeakKeyDictionary()


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


@torch.no_grad()
def _look(model: PreTrainedModel) -> Sites:
    encoder_ids, decoder_ids = (_some_ids(model, count) for count in (_ENCODER_TOKENS, _DECODER_TOKENS))
    calls = _recorded(model, encoder_ids, decoder_ids, None)
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
    for call in calls:
        kind = _kind(model, call, names[call.module], encoder_names)
        found.append(
            Site(
                layer=counts[kind],
                kind=kind,
                module=names[call.module],
                num_heads=call.query.shape[1],
                num_key_value_heads=call.key.shape[1],
                key_width=call.key.shape[3],
                value_width=call.value.shape[3],
            )
        )
        counts[kind] += 1
    return Sites(
        attention=tuple(found),
        hidden_size=int(model.get_input_embeddings().weight.shape[1]),  # type: ignore[index]
        is_encoder_decoder=bool(model.config.is_encoder_decoder),
        positions=_position_kind(model, decoder_ids, calls),
    )


def _some_ids(model: PreTrainedModel, count: int) -> Tensor:
    """Tokens to look with; none of them padding, which some models count positions by."""
    ids = [i for i in range(count + 1) if i != getattr(model.config.get_text_config(), "pad_token_id", None)]
    return torch.tensor([ids[:count]], device=model.device)


def _recorded(
    model: PreTrainedModel, encoder_ids: Tensor, decoder_ids: Tensor, first_position: int | None
) -> list[RecordedCall]:
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
    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # type: ignore[no-untyped-call]
    try:
        with recording(model) as calls:
            model(**inputs, use_cache=False)
    finally:
        for module, mode in modes:
            module.training = mode
    return calls


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
