"""Attention in decoding: one query a row, no gradient, one softmax over slots and tokens, plain products.

In half precision scores are rounded before the softmax, as in transformers' eager attention.

The slots of all attached prefixes lie side by side as one *lot*, made once and kept at their tensor. A lot takes one of
three forms, by what is cheapest for it:

- few slots that all rows share: all heads meet the slots of all groups in one product, those of other groups masked;
- many that all rows share: one product a group, with all rows at once;
- slots that differ from row to row: one product a row and group.

In the first two nothing is copied per row.

Axes: B rows, S tokens, P slots, H query heads, G key/value heads, R = H / G, D key width, E value width, L scores that
a head has with a lot; X and Y any widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from antefix.attention.partial import KeySet, additive_of_slots

_FEW = 128
"""Slots of all groups together, up to which they are one product."""
_LOT_ATTRIBUTE = "antefix_lot"


def joined(query_BH1D: Tensor, tokens: KeySet, slots: Sequence[KeySet], scale: float) -> Tensor:
    """The merged attention: (B, H, 1, E)."""
    B, H, _, D = query_BH1D.shape
    G, S = tokens.key_BGSD.shape[1:3]
    lot = _lot_of(slots, query_BH1D, scale)

    query = query_BH1D.reshape(B * G, H // G, D)
    key, value = tokens.key_BGSD.flatten(0, 1).transpose(1, 2), tokens.value_BGSE.flatten(0, 1)
    if tokens.mask is None:
        of_tokens = torch.bmm(query, key).mul_(scale)
    else:
        of_tokens = torch.baddbmm(tokens.mask.by_group(B, G), query, key, alpha=scale)
    of_slots = lot.scores(query.view(B, H, D))
    weights = torch.softmax(torch.cat([of_slots, of_tokens.view(B, H, S)], dim=2), dim=2)
    if tokens.mask is not None and tokens.mask.blind is not None:
        weights = weights.nan_to_num(0.0)  # a row that sees neither a token nor a slot

    L = of_slots.shape[2]
    out = torch.bmm(weights[..., L:].view(B * G, H // G, S), value)
    return lot.add_values(out.view(B, H, -1), weights[..., :L])[:, :, None]


class _Lot(Protocol):
    """Slots side by side in the queries' precision, their keys scaled."""

    def scores(self, query_BHD: Tensor) -> Tensor:
        """(B, H, L)."""
        ...

    def add_values(self, out_BHE: Tensor, weights_BHL: Tensor) -> Tensor:
        """The output with the values of slots, weighed; it may be written into."""
        ...


@dataclass(frozen=True, slots=True)
class _Few:
    """Keys (D, G * P), values (G * P, E); mask (B * H, G * P), -inf for the slots of other groups."""

    key: Tensor
    value: Tensor
    mask: Tensor

    @classmethod
    def of(cls, key_GPD: Tensor, value_GPE: Tensor, num_rows: int, num_heads: int) -> _Few:
        G, P, _ = key_GPD.shape
        own_HG = torch.eye(G, dtype=torch.bool, device=key_GPD.device).repeat_interleave(num_heads // G, dim=0)
        mask = key_GPD.new_zeros(num_heads, G).masked_fill_(~own_HG, -torch.inf).repeat_interleave(P, dim=1)
        return cls(key_GPD.flatten(0, 1).t().contiguous(), value_GPE.flatten(0, 1), mask.repeat(num_rows, 1))

    def scores(self, query_BHD: Tensor) -> Tensor:
        B, H, _ = query_BHD.shape
        return torch.addmm(self.mask, query_BHD.flatten(0, 1), self.key).view(B, H, -1)

    def add_values(self, out_BHE: Tensor, weights_BHL: Tensor) -> Tensor:
        out_BHE.flatten(0, 1).addmm_(weights_BHL.flatten(0, 1), self.value)
        return out_BHE


@dataclass(frozen=True, slots=True)
class _Many:
    """Keys (G, D, P), values (G, P, E)."""

    key: Tensor
    value: Tensor

    @classmethod
    def of(cls, key_GPD: Tensor, value_GPE: Tensor) -> _Many:
        return cls(key_GPD.transpose(1, 2).contiguous(), value_GPE)

    def scores(self, query_BHD: Tensor) -> Tensor:
        return self._times(query_BHD, self.key)

    def add_values(self, out_BHE: Tensor, weights_BHL: Tensor) -> Tensor:
        return out_BHE.add_(self._times(weights_BHL, self.value))

    def _times(self, x_BHX: Tensor, y_GXY: Tensor) -> Tensor:
        """All rows and heads of a group with its slots at once: (B, H, Y)."""
        (B, H, X), G = x_BHX.shape, len(y_GXY)
        by_group = x_BHX.view(B, G, H // G, X).transpose(0, 1).reshape(G, -1, X)
        return torch.bmm(by_group, y_GXY).view(G, B, H // G, -1).transpose(0, 1).reshape(B, H, -1)


@dataclass(frozen=True, slots=True)
class _OwnOfRows:
    """Keys (B * G, D, P), values (B * G, P, E); mask (B * G, 1, P) or None, -inf for what a row does not have."""

    key: Tensor
    value: Tensor
    mask: Tensor | None

    @classmethod
    def of(cls, key_BGPD: Tensor, value_BGPE: Tensor, mask_BP: Tensor | None) -> _OwnOfRows:
        G = key_BGPD.shape[1]
        mask = None if mask_BP is None else mask_BP.to(key_BGPD.dtype).repeat_interleave(G, dim=0)[:, None]
        return cls(key_BGPD.flatten(0, 1).transpose(1, 2).contiguous(), value_BGPE.flatten(0, 1), mask)

    def scores(self, query_BHD: Tensor) -> Tensor:
        query = query_BHD.view(len(self.key), -1, query_BHD.shape[2])
        scores = torch.bmm(query, self.key) if self.mask is None else torch.baddbmm(self.mask, query, self.key)
        return scores.view(*query_BHD.shape[:2], -1)

    def add_values(self, out_BHE: Tensor, weights_BHL: Tensor) -> Tensor:
        weights = weights_BHL.view(len(self.value), -1, weights_BHL.shape[2])
        out_BHE.view(len(self.value), -1, out_BHE.shape[2]).baddbmm_(weights, self.value)
        return out_BHE


def _lot_of(slots: Sequence[KeySet], query: Tensor, scale: float) -> _Lot:
    """The lot of these slots; kept while an attachment stays as it is."""
    if len(slots) > 1:  # what else is there may be another the next time
        return _made_lot(slots, query, scale)
    (first,) = slots
    versions = tuple(None if x.is_inference() else x._version for x in (first.key_BGSD, first.value_BGSE))
    # The mask itself, not its address: as long as it is kept here no other can take its place.
    made_for = (first.mask, query.shape[:2], query.dtype, scale, versions)
    known: tuple[Any, _Lot] | None = first.key_BGSD.__dict__.get(_LOT_ATTRIBUTE)
    if known is not None and known[0] == made_for:
        return known[1]
    lot = _made_lot(slots, query, scale)
    first.key_BGSD.__dict__[_LOT_ATTRIBUTE] = (made_for, lot)
    return lot


def _made_lot(slots: Sequence[KeySet], query: Tensor, scale: float) -> _Lot:
    B, H = query.shape[:2]
    shared = all(s.key_BGSD.shape[0] == 1 and s.mask is None for s in slots)
    num_rows = 1 if shared else B
    key, value = (
        torch.cat([x.expand(num_rows, -1, -1, -1) for x in parts], dim=2)
        for parts in ([s.key_BGSD for s in slots], [s.value_BGSE for s in slots])
    )
    key, value = (key * scale).to(query.dtype), value.to(query.dtype)
    if not shared:
        masked = any(s.mask is not None for s in slots)
        return _OwnOfRows.of(key, value, torch.cat([additive_of_slots(s, B) for s in slots], dim=1) if masked else None)
    if key.shape[1] * key.shape[2] <= _FEW:
        return _Few.of(key[0], value[0], B, H)
    return _Many.of(key[0], value[0])
