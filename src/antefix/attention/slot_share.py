"""Slots whose scores are not those of plain keys: scored, changed, and made a share of the softmax.

Axes: B rows, T queries, P slots, H query heads, G key/value heads, D key width, E value width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from antefix.attention.branch import Branch, Call, Share
from antefix.attention.partial import Scores


def slot_scores(query_BHTD: Tensor, key_GPD: Tensor, scores: Scores, gate_BHTP: Tensor | None = None) -> Tensor:
    """Scaled products of queries and slots' keys, capped as the model caps: (B, H, T, P), float32 or wider.

    gate_BHTP: what keys are multiplied by, and so their products before any cap.
    """
    query, key = _wide(query_BHTD, key_GPD)
    products = torch.matmul(query, _by_head(key, query_BHTD.shape[1]).mT) * scores.scale
    if gate_BHTP is not None:
        products = products * gate_BHTP
    return products if scores.softcap is None else torch.tanh(products / scores.softcap) * scores.softcap


def share_of(scores_BHTP: Tensor, value_BGPE: Tensor, gate_BHTP: Tensor | None = None) -> Share:
    """The softmax's share of slots with these scores (-inf: not seen); every value times its gate."""
    highest = scores_BHTP.amax(-1).detach()  # -inf where a query sees no slot: no share at all
    weights = torch.exp(scores_BHTP - torch.where(highest == -torch.inf, 0.0, highest)[..., None])
    gated = weights if gate_BHTP is None else weights * gate_BHTP
    gated, value = _wide(gated, value_BGPE)
    num = torch.matmul(gated, _by_head(value, scores_BHTP.shape[1]))
    return Share(num, weights.sum(-1), highest)


class SlotBranch(Branch):
    """Keys (G, P, D) and values (G, P, E) that compete with tokens; a method changes scores and values."""

    def __init__(self, key_GPD: Tensor, value_GPE: Tensor) -> None:
        self.key_GPD, self.value_GPE = key_GPD, value_GPE

    def __call__(self, call: Call) -> Share:
        gate = self.gate(call)
        scores = self.changed(call, slot_scores(call.query_BHTD, self.key_GPD, call.scores, gate))
        return share_of(scores, self.value(call), gate)

    def changed(self, call: Call, scores_BHTP: Tensor) -> Tensor:
        """The scores as they compete."""
        return scores_BHTP

    def value(self, call: Call) -> Tensor:
        """Values, (B or 1, G, P, E)."""
        return self.value_GPE[None]

    def gate(self, call: Call) -> Tensor | None:
        """What keys and values are multiplied by, (B or 1, 1 or H, T, P)."""
        return None

    def tensors(self) -> Sequence[Tensor]:
        return (self.key_GPD, self.value_GPE)


def _wide(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider of their precisions, float32 at least."""
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.to(dtype), b.to(dtype)


def _by_head(x: Tensor, num_heads: int) -> Tensor:
    """(..., G, P, X) for every query head."""
    return x.repeat_interleave(num_heads // x.shape[-3], dim=-3)
