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
    """One query: what it is, what it sees, and where it stands."""

    q_D: Tensor
    keys_SD: Tensor
    """Of the tokens that it sees."""
    values_SE: Tensor
    scale: float
    cap: float | None
    """Scores are cap tanh(score / cap)."""
    hidden_TC: Tensor
    """What its layer is given, of all tokens of its text."""
    place: int
    """Its own among them."""
    prompt: list[int]
    """Those of its source, the last one included."""
    segment: int
    """Which half of its part of the text it stands in."""
    head: int
    num_heads: int
    group: int
    layer: int

    def scores(self, keys_PD: Tensor) -> Tensor:
        scores = keys_PD @ self.q_D * self.scale
        return scores if self.cap is None else torch.tanh(scores / self.cap) * self.cap


@dataclass(frozen=True)
class Given:
    """What a branch makes of one query."""

    out_E: Tensor
    """What goes into the output projection."""
    behind_C: Tensor | None = None
    """This head's part of what is added behind it."""


def softmaxed(scores: Tensor, values: Tensor) -> Tensor:
    return torch.softmax(scores, 0) @ values


def of_tokens(x: Query) -> Tensor:
    return softmaxed(x.scores(x.keys_SD), x.values_SE)


def with_slots(x: Query, slot_scores: Tensor, slot_values: Tensor) -> Given:
    scores = torch.cat([slot_scores, x.scores(x.keys_SD)])
    return Given(softmaxed(scores, torch.cat([slot_values, x.values_SE])))


def _apt(x: Query, t: Tensors, state_C: Tensor) -> Given:
    """One softmax over slots lambda alpha [P_k; P_v] and tokens."""
    gate = t["layer_gate"] * torch.sigmoid(state_C @ t["token_gate"])
    keys, values = t["key"][x.group] * gate[:, None], t["value"][x.group] * gate[:, None]
    return with_slots(x, x.scores(keys), values)


def apt_of_token(x: Query, t: Tensors) -> Given:
    return _apt(x, t, x.hidden_TC[x.place])


def apt_of_first(x: Query, t: Tensors) -> Given:
    return _apt(x, t, x.hidden_TC[0])


def apt_of_mean(x: Query, t: Tensors) -> Given:
    return _apt(x, t, x.hidden_TC[x.prompt].mean(0))


def hierarchical_blocking(x: Query, t: Tensors) -> Given:
    """Slots of the query's own half, in the lower half of the layers."""
    keys, values = t["key"][x.group], t["value"][x.group]
    if x.layer == 0:
        half = [m for m in range(len(keys)) if m * 2 // len(keys) == x.segment]
        keys, values = keys[half], values[half]
    return with_slots(x, x.scores(keys), values)


def ntk_attention(x: Query, t: Tensors) -> Given:
    """As released: sums of kernels beside sums of exponentials, d^(1/4) on either side."""
    weights = torch.exp(x.scores(x.keys_SD))
    phi = elu(x.q_D * x.scale**0.5) + 1
    above = weights @ x.values_SE + phi @ t["z"][x.head]
    return Given(above / (weights.sum() + phi @ t["k"][x.head].abs()))


def _inducer_share(x: Query, t: Tensors) -> Tensor:
    hidden = torch.tanh(x.q_D @ t["key_in"][x.head] + t["key_in_bias"][x.head])
    key = x.q_D + hidden @ t["key_out"][x.head] + t["key_out_bias"][x.head]
    mine, theirs = torch.exp(x.q_D @ key * x.scale), torch.exp(x.scores(x.keys_SD)).sum()
    return mine / (mine + theirs)


def _inducer_hidden(x: Query, t: Tensors) -> Tensor:
    return torch.tanh(x.q_D @ t["value_in"][x.head] + t["value_in_bias"][x.head])


def inducer_before(x: Query, t: Tensors) -> Given:
    """o_c + lambda MLP_v(q), before the projection."""
    value = _inducer_hidden(x, t) @ t["value_out"][x.head] + t["value_out_bias"][x.head]
    return Given(of_tokens(x) + _inducer_share(x, t) * value)


def inducer_behind(x: Query, t: Tensors) -> Given:
    """W_O(concat o_c) + sum_h lambda_h tanh(q_h A_h + a_h) B_h + b: b in equal parts of the heads here."""
    value = _inducer_share(x, t) * (_inducer_hidden(x, t) @ t["value_out"][x.head])
    return Given(of_tokens(x), value + t["value_out_bias"] / x.num_heads)


def inducer_share(x: Query, t: Tensors) -> Given:
    """(1 - lambda) o_c + lambda MLP_v(q)."""
    share = _inducer_share(x, t)
    value = _inducer_hidden(x, t) @ t["value_out"][x.head] + t["value_out_bias"][x.head]
    return Given((1 - share) * of_tokens(x) + share * value)


def llama_adapter(x: Query, t: Tensors) -> Given:
    """Two softmaxes, the second behind a gate."""
    keys, values = t["key"][x.group], t["value"][x.group]
    return Given(of_tokens(x) + torch.tanh(t["gate"][x.head]) * softmaxed(x.scores(keys), values))


def memory_of_queries(x: Query, t: Tensors) -> Given:
    """Outside the softmax."""
    return Given(of_tokens(x) + elu(x.q_D) @ t["memory"][x.head])


def memory_of_states(x: Query, t: Tensors) -> Given:
    """Of the layer's input, behind the projection: in equal parts of the heads here."""
    return Given(of_tokens(x), elu(x.hidden_TC[x.place]) @ t["memory"] / x.num_heads)


def sparse_prefix(x: Query, t: Tensors) -> Given:
    """Sharper attention to slots."""
    keys, values = t["key"][x.group], t["value"][x.group]
    return with_slots(x, x.scores(keys) / torch.exp(t["theta"]), values)


REFERENCES: dict[str, tuple[str, Callable[[Query, Tensors], Given], dict[str, Any]]] = {
    "apt, a token's own gates": ("apt", apt_of_token, {"gate_from": "token"}),
    "apt, the first token's": ("apt", apt_of_first, {"gate_from": "first"}),
    "apt, gates of the mean": ("apt", apt_of_mean, {"gate_from": "mean"}),
    "hierarchical_blocking": (
        "hierarchical_blocking", hierarchical_blocking, {"blocks": 2, "blocked_layers": 0.3, "target_tokens": 5},
    ),
    "inducer": ("inducer", inducer_behind, {}),
    "inducer, before the projection": ("inducer", inducer_before, {"value_extension": False}),
    "inducer, a share": ("inducer", inducer_share, {"value_extension": False, "gating_ablation": True}),
    "llama_adapter": ("llama_adapter", llama_adapter, {}),
    "ntk_attention": ("ntk_attention", ntk_attention, {}),
    "prefix_memory": ("prefix_memory", memory_of_queries, {}),
    "prefix_memory, of states": ("prefix_memory", memory_of_states, {"place": "after_projection"}),
    "sparse_prefix": ("sparse_prefix", sparse_prefix, {"top_k": None}),
}  # fmt: skip
"""A method, its equation, and the config under which it is that."""
