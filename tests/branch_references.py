"""The slow twins of branches: each method's equation for one query of one head, in float64, with plain loops.

Nothing here is shared with the code that it pins. D key width, E value width, P slots, C width of hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import elu

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Query:
    """One query: what it is, what it sees, and the tensors of its head at this site."""

    q_D: Tensor
    keys_SD: Tensor
    """Of the tokens that it sees."""
    values_SE: Tensor
    scale: float
    hidden_C: Tensor
    """The layer's input at its place."""
    segment: int
    """Which half of its part of the text it stands in."""
    head: int
    group: int
    layer: int


def softmaxed(scores: Tensor, values: Tensor) -> Tensor:
    return torch.softmax(scores, 0) @ values


def of_tokens(x: Query) -> Tensor:
    return softmaxed(x.keys_SD @ x.q_D * x.scale, x.values_SE)


def with_slots(x: Query, slot_scores: Tensor, slot_values: Tensor) -> Tensor:
    scores = torch.cat([slot_scores, x.keys_SD @ x.q_D * x.scale])
    return softmaxed(scores, torch.cat([slot_values, x.values_SE]))


def apt(x: Query, t: Tensors) -> Tensor:
    """One softmax over slots lambda alpha [P_k; P_v] and tokens."""
    gate = t["layer_gate"] * torch.sigmoid(x.hidden_C @ t["token_gate"])
    keys, values = t["key"][x.group] * gate[:, None], t["value"][x.group] * gate[:, None]
    return with_slots(x, keys @ x.q_D * x.scale, values)


def hierarchical_blocking(x: Query, t: Tensors) -> Tensor:
    """Slots of the query's own half, in the lower half of the layers."""
    keys, values = t["key"][x.group], t["value"][x.group]
    if x.layer == 0:
        half = [m for m in range(len(keys)) if m * 2 // len(keys) == x.segment]
        keys, values = keys[half], values[half]
    return with_slots(x, keys @ x.q_D * x.scale, values)


def ntk_attention(x: Query, t: Tensors) -> Tensor:
    """As released: sums of kernels beside sums of exponentials, d^(1/4) on either side."""
    weights = torch.exp(x.keys_SD @ x.q_D * x.scale)
    phi = elu(x.q_D * x.scale**0.5) + 1
    above = weights @ x.values_SE + phi @ t["z"][x.head]
    return above / (weights.sum() + phi @ t["k"][x.head].abs())


def inducer(x: Query, t: Tensors) -> Tensor:
    """o_c + lambda MLP_v(q), before the projection."""
    hidden = torch.tanh(x.q_D @ t["key_in"][x.head] + t["key_in_bias"][x.head])
    key = x.q_D + hidden @ t["key_out"][x.head] + t["key_out_bias"][x.head]
    value = torch.tanh(x.q_D @ t["value_in"][x.head] + t["value_in_bias"][x.head])
    value = value @ t["value_out"][x.head] + t["value_out_bias"][x.head]
    mine, theirs = torch.exp(x.q_D @ key * x.scale), torch.exp(x.keys_SD @ x.q_D * x.scale).sum()
    return of_tokens(x) + mine / (mine + theirs) * value


def llama_adapter(x: Query, t: Tensors) -> Tensor:
    """Two softmaxes, the second behind a gate."""
    keys, values = t["key"][x.group], t["value"][x.group]
    return of_tokens(x) + torch.tanh(t["gate"][x.head]) * softmaxed(keys @ x.q_D * x.scale, values)


def prefix_memory(x: Query, t: Tensors) -> Tensor:
    """Outside the softmax."""
    return of_tokens(x) + elu(x.q_D) @ t["memory"][x.head]


def sparse_prefix(x: Query, t: Tensors) -> Tensor:
    """Sharper attention to slots."""
    keys, values = t["key"][x.group], t["value"][x.group]
    return with_slots(x, keys @ x.q_D * x.scale / torch.exp(t["theta"]), values)


REFERENCES: dict[str, tuple[Callable[[Query, Tensors], Tensor], dict[str, Any]]] = {
    "apt": (apt, {"gate_from": "token"}),
    "hierarchical_blocking": (hierarchical_blocking, {"blocks": 2, "blocked_layers": 0.3, "target_tokens": 5}),
    "inducer": (inducer, {"value_extension": False}),
    "llama_adapter": (llama_adapter, {}),
    "ntk_attention": (ntk_attention, {}),
    "prefix_memory": (prefix_memory, {}),
    "sparse_prefix": (sparse_prefix, {"top_k": None}),
}
"""A method's equation, and the config under which it is that."""
