"""Adaptive prefix tuning (Zhang et al. 2023, arXiv 2305.15212): slots weighed by what the layer is given.

At every layer, with the layer's input h, a gate of every slot and a gate of the layer weigh keys and values alike:

    alpha = sigmoid(h W),  W of shape (C, P)
    P_hat = lambda * alpha * [P_k; P_v]

and attention goes over P_hat as over a prefix. The score of a query and slot m is then lambda alpha_m s (q . P_k,m).

No code was released, and the paper leaves open whose state h is, and how the gates start. Decided here: h is the
layer's input as it is (the residual stream); its token is `gate_from`; W starts at 0 and lambda at 2, so that the gates
start at 1 and the prefix as prefix-tuning's. No setting of the gates gives the bare base: a slot of zeros keeps its
share of the softmax.

Axes: P slots, G key/value heads, D key width, C width of hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from antefix.attention.branch import Call
from antefix.attention.slot_share import SlotBranch
from antefix.methods.branched_slots import BranchedSlots
from antefix.methods.prefix_tuning import PrefixTuningConfig
from antefix.parts.key_value import KeyValue
from antefix.parts.site_tensors import Shapes
from antefix.sites import Site

GateFrom = Literal["token", "first", "mean"]


class AptConfig(PrefixTuningConfig):
    """The choices of adaptive prefix tuning: those of prefix-tuning, and the gates'."""

    gate_from: GateFrom | None = None
    """Whose hidden state makes the gates: every `token` its own, the text's `first`, or the `mean` over the text. In a
    decoder the last two are taken from the source and stay. None: `first` in encoders, `token` in decoders."""
    token_gate: bool = True
    """A gate for every slot; without: an ablation of the paper."""
    layer_gate: bool = True
    """A gate for every layer; without: an ablation of the paper."""
    hidden_state: bool = True
    """Gates from hidden states; without: a free vector, an ablation of the paper."""


class AptBranch(SlotBranch):
    """Slots at one site with their gates."""

    def __init__(self, slots: KeyValue, own: Mapping[str, Tensor], gate_from: GateFrom) -> None:
        super().__init__(*slots)
        self._token_gate, self._layer_gate, self._gate_from = own.get("token_gate"), own.get("layer_gate"), gate_from
        self.needs_hidden_states = self._token_gate is not None and self._token_gate.ndim == 2

    def gate(self, call: Call) -> Tensor:
        gate = self._of_tokens(call)
        # Without a gate of its own a layer weighs so that gates of a half are none.
        layer = (1.0 if self._token_gate is None else 2.0) if self._layer_gate is None else self._layer_gate
        return (gate * layer)[:, None]

    def _of_tokens(self, call: Call) -> Tensor:
        """(B or 1, T or 1, P)."""
        weights = self._token_gate
        if weights is None:
            return self.key_GPD.new_ones(1, 1, 1)
        if not self.needs_hidden_states:
            return torch.sigmoid(weights)[None, None]
        state = call.hidden().to(weights.dtype)
        if self._gate_from != "token":
            chosen = call.whole_prompt() if self._gate_from == "mean" else call.places().is_prompt & _first(call)
            state = call.of_prompt("state", state, chosen)
        return torch.sigmoid(state @ weights)


def _first(call: Call) -> Tensor:
    places = call.places()
    return (places.index == 0) & (places.is_source | (places.source_length == 0))


class Apt(BranchedSlots):
    """One adaptive prefix."""

    Config = AptConfig
    summary = "a prefix whose slots are weighed by the layer's input (Zhang et al. 2023)"
    paper = "arXiv 2305.15212"
    parts = ("key/value slots", "token gates", "layer gates")

    @property
    def needs_places(self) -> bool:
        return self.config.gate_from in ("first", "mean")

    @classmethod
    def shapes(cls, site: Site, config: Any, num_slots: int) -> Shapes:
        shapes: dict[str, tuple[int, ...]] = {}
        if config.token_gate:
            shapes["token_gate"] = (site.hidden_width, num_slots) if config.hidden_state else (num_slots,)
        if config.layer_gate:
            shapes["layer_gate"] = (1,)
        return shapes

    @classmethod
    def initial_of(cls, part: str, shape: tuple[int, ...], config: Any) -> Tensor:
        if part == "token_gate":
            return torch.zeros(shape)
        return torch.full(shape, 2.0 if config.token_gate else 1.0)

    def branch(self, site: Site, slots: KeyValue, own: Mapping[str, Tensor]) -> SlotBranch:
        return AptBranch(slots, own, self.config.gate_from or ("first" if site.kind == "encoder_self" else "token"))
