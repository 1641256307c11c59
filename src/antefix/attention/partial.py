"""Attention over one set of keys, and over a union of sets.

Attention over a union is a merge of partial results (He et al. 2022, arXiv 2110.04366, equations 7-8):
every set gives the softmax-weighted mean of its values and the log of its normaliser, and the merged
output weighs the means by the softmax of the logs. The base's tokens are one set, a prefix's slots another.

Three forms, equal in value and gradient to `antefix.attention.reference` (a fourth, for decoding, is in
`antefix.attention.joined`, and `antefix.attention.attend` chooses by capability):

- `fused` calls the processor's flash kernel for every set. The kernel returns the normaliser but no
  gradient through it, and none is needed: the kernel's own backward, called with the *merged* output and
  the *merged* normaliser, is the exact gradient of the merged attention for that set.
- `concatenated` puts all sets side by side and calls SDPA, with whatever kernel the device has for it. It
  knows position biases and dropout; it copies the cache at every decoded token.
- `explicit` writes the scores out. It knows soft caps and attention sinks too.

Axes: B rows, T queries, S keys, P slots, H query heads, G key/value heads, R = H / G, D key width, E value width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class KeySet(NamedTuple):
    """Keys and values that queries may look at, with as many heads as the model's key/value heads."""

    key_BGSD: Tensor
    value_BGSE: Tensor
    mask: Mask | None = None
    """None: every query sees every key."""
    is_causal: bool = False
    """Query t sees keys 0..t; only with `mask=None` and as many keys as queries."""
    for_targets: bool = False
    """Only queries of targets see these keys; `seen_by` makes that a mask."""

    def seen_by(self, is_target_BT: Tensor | None) -> KeySet:
        """The same keys as these queries see them (None: all are a target's)."""
        if not self.for_targets or is_target_BT is None:
            return self._replace(for_targets=False)
        visible = is_target_BT[:, None, :, None]
        if self.mask is not None:
            visible = visible & (self.mask.additive > -torch.inf)
        visible = visible.expand(-1, -1, -1, self.key_BGSD.shape[2])
        return self._replace(mask=Mask.of(visible, self.key_BGSD.dtype), for_targets=False)


@dataclass(frozen=True, eq=False)
class Mask:
    """Which query sees which key, made once for all layers of a forward pass.

    additive: 0 or -inf (or a finite bias), broadcastable to B, H, T, S, in the dtype of the queries.
    blind: True where a query sees no key at all, shape B, 1, T; None where every query sees one.
    """

    additive: Tensor
    blind: Tensor | None

    @classmethod
    def of(cls, mask: Tensor, dtype: torch.dtype) -> Mask:
        """From a boolean mask (True = sees) or an additive one, four axes."""
        if mask.dtype == torch.bool:
            visible = mask
            additive = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
        else:
            visible = mask > torch.finfo(mask.dtype).min
            additive = mask.to(dtype).masked_fill(~visible, -torch.inf)
        blind = ~visible.any(dim=-1)
        return cls(additive, blind if bool(blind.any()) else None)

    def by_group(self, B: int, G: int) -> Tensor:
        """Of one query a row, for every key/value head: (B * G, 1, S); made once."""
        made: Tensor | None = self.__dict__.get("_by_group")
        if made is None or made.shape[0] != B * G:
            made = self.additive.expand(B, G, 1, -1).reshape(B * G, 1, -1)
            self.__dict__["_by_group"] = made
        return made


class Partial(NamedTuple):
    """Attention over one key set.

    out: the weighted mean of the values, 0 where nothing is seen. lse: the log of the softmax's normaliser,
    float32, -inf where nothing is seen.
    """

    out_BHTE: Tensor
    lse_BHT: Tensor


def merge(left: Partial, right: Partial) -> Partial:
    """The partial result over the union of two disjoint key sets."""
    # Where the right side sees nothing its weight is 0, also where the left side sees nothing either.
    nothing = right.lse_BHT == -torch.inf
    weight_BHT = torch.where(nothing, 0.0, torch.sigmoid(right.lse_BHT - left.lse_BHT))
    out = torch.lerp(left.out_BHTE, right.out_BHTE, weight_BHT.to(left.out_BHTE.dtype)[..., None])
    return Partial(out, torch.logaddexp(left.lse_BHT, right.lse_BHT))


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """How a model turns products of queries and keys into scores, beyond a plain scale."""

    scale: float
    softcap: float | None = None
    """Scores s become softcap * tanh(s / softcap) (Gemma 2); slots as well as tokens."""
    position_bias: Tensor | None = None
    """Added to the scores of tokens (T5), never to slots: a slot has no position."""
    sink_logits_H: Tensor | None = None
    """One more logit a head that takes weight and gives nothing (attention sinks)."""
    dropout: float = 0.0

    @property
    def masked_only(self) -> bool:
        """Whether SDPA can compute these scores."""
        return self.softcap is None and self.sink_logits_H is None

    @property
    def plain(self) -> bool:
        """Whether a flash kernel can compute these scores."""
        return self.masked_only and self.position_bias is None and self.dropout == 0.0


def additive_of_slots(slots: KeySet, num_rows: int) -> Tensor:
    """Which of its slots a row has: 0 or -inf, (num_rows, P), float32."""
    if slots.mask is None:
        return slots.key_BGSD.new_zeros(num_rows, slots.key_BGSD.shape[2], dtype=torch.float32)
    return slots.mask.additive[:, 0, 0].float().expand(num_rows, -1)


def _side_by_side(query_BHTD: Tensor, sets: Sequence[KeySet]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Query, keys and values with equal numbers of rows and heads, as kernels want them.

    One query a row with grouped heads: the heads of a group stand side by side as queries, and no key is repeated.
    """
    B, H, T, D = query_BHTD.shape
    G = sets[0].key_BGSD.shape[1]
    if T == 1 and G < H and all(s.mask is None or s.mask.additive.shape[1] == 1 for s in sets):
        query, pairs = query_BHTD.reshape(B, G, H // G, D), [(s.key_BGSD, s.value_BGSE) for s in sets]
    else:
        query, pairs = query_BHTD, [_repeat_heads(s, H) for s in sets]
    return query, [(k.expand(B, -1, -1, -1), v.expand(B, -1, -1, -1)) for k, v in pairs]


# --- the explicit form --------------------------------------------------------------------------------------


def explicit(query_BHTD: Tensor, tokens: KeySet, slots: Sequence[KeySet], scores: Scores) -> Tensor:
    """Writes the scores out; gradients by ordinary automatic differentiation."""
    return explicit_union(query_BHTD, tokens, slots, scores).out_BHTE


def explicit_union(query_BHTD: Tensor, tokens: KeySet, slots: Sequence[KeySet], scores: Scores) -> Partial:
    """The same with its normaliser, which has a gradient too."""
    result = explicit_partial(query_BHTD, tokens, scores, position_bias=scores.position_bias)
    if scores.sink_logits_H is not None:
        lse = scores.sink_logits_H.float()[None, :, None].expand_as(result.lse_BHT)
        result = merge(result, Partial(torch.zeros_like(result.out_BHTE), lse))
    for slot_set in slots:
        result = merge(result, explicit_partial(query_BHTD, slot_set, scores))
    return result


def explicit_partial(query_BHTD: Tensor, keys: KeySet, scores: Scores, position_bias: Tensor | None = None) -> Partial:
    """One key set, scores and softmax in float32 (or wider, if the queries are)."""
    wide = torch.promote_types(query_BHTD.dtype, torch.float32)
    key_BHSD, value_BHSE = _repeat_heads(keys, query_BHTD.shape[1])
    products = torch.matmul(query_BHTD, key_BHSD.transpose(-1, -2)).to(wide) * scores.scale
    if scores.softcap is not None:
        products = torch.tanh(products / scores.softcap) * scores.softcap
    if position_bias is not None:
        products = products + position_bias
    # A finite lowest value, not -inf: a query that sees nothing must not make NaN, in gradients least of all.
    lowest = torch.finfo(wide).min
    blind = None
    if keys.mask is not None:
        products = torch.clamp(products + keys.mask.additive, min=lowest)
        blind = keys.mask.blind
    elif keys.is_causal:
        causal = torch.ones(products.shape[-2:], dtype=torch.bool, device=products.device).tril()
        products = products.masked_fill(~causal, lowest)
    lse_BHT = torch.logsumexp(products, dim=-1)
    weights = torch.exp(products - lse_BHT[..., None])
    weights = torch.dropout(weights, scores.dropout, train=scores.dropout > 0)
    out_BHTE = torch.matmul(weights.to(value_BHSE.dtype), value_BHSE)
    if blind is not None:
        lse_BHT = lse_BHT.masked_fill(blind, -torch.inf)
        out_BHTE = out_BHTE.masked_fill(blind[..., None], 0.0)
    return Partial(out_BHTE, lse_BHT)


def _repeat_heads(keys: KeySet, num_heads: int) -> tuple[Tensor, Tensor]:
    repeats = num_heads // keys.key_BGSD.shape[1]
    if repeats == 1:
        return keys.key_BGSD, keys.value_BGSE
    return keys.key_BGSD.repeat_interleave(repeats, dim=1), keys.value_BGSE.repeat_interleave(repeats, dim=1)


# --- the concatenated form ----------------------------------------------------------------------------------


def concatenated(query_BHTD: Tensor, tokens: KeySet, slots: Sequence[KeySet], scores: Scores) -> Tensor:
    """SDPA over slots and tokens side by side; gradients by ordinary automatic differentiation."""
    if scores.position_bias is not None:
        tokens = tokens._replace(mask=_with_bias(query_BHTD, tokens, scores.position_bias), is_causal=False)
    sets = [*slots, tokens]
    query, pairs = _side_by_side(query_BHTD, sets)
    out = torch.nn.functional.scaled_dot_product_attention(
        query, torch.cat([k for k, _ in pairs], dim=2), torch.cat([v for _, v in pairs], dim=2),
        attn_mask=_mask_over(query_BHTD, sets), dropout_p=scores.dropout, scale=scores.scale,
    )  # fmt: skip
    return out.reshape(*query_BHTD.shape[:3], -1)


def _with_bias(query: Tensor, tokens: KeySet, bias: Tensor) -> Mask:
    additive = _additive(query, tokens)
    return Mask(bias.to(query.dtype) if additive is None else bias.to(query.dtype) + additive, None)


def _mask_over(query: Tensor, sets: Sequence[KeySet]) -> Tensor | None:
    """The additive masks of all sets side by side; None where every query sees every key."""
    masks = [_additive(query, s) for s in sets]
    if all(m is None for m in masks):
        return None
    axes = torch.broadcast_shapes(*(m.shape[:3] for m in masks if m is not None))  # type: ignore[no-untyped-call]
    widths = [s.key_BGSD.shape[2] for s in sets]
    parts = [query.new_zeros(()) if m is None else m for m in masks]
    return torch.cat([m.expand(*axes, width) for m, width in zip(parts, widths, strict=True)], dim=3)


def _additive(query: Tensor, keys: KeySet) -> Tensor | None:
    if keys.mask is not None:
        return keys.mask.additive
    if not keys.is_causal:
        return None
    T = query.shape[2]
    return query.new_full((1, 1, T, T), -torch.inf).triu(1)


# --- the fused form -----------------------------------------------------------------------------------------


def fused_kernel_fits(query: Tensor, value: Tensor) -> bool:
    """Whether there is a flash kernel that gives the normaliser too."""
    return (
        query.device.type == "cpu"
        and query.dtype in (torch.float32, torch.bfloat16)
        and query.shape[-1] == value.shape[-1]
    )


def fused(query_BHTD: Tensor, key_sets: Sequence[KeySet], scale: float) -> Tensor:
    """The flash kernel on every key set, merged; exact gradients for queries, keys and values."""
    query, pairs = _side_by_side(query_BHTD, key_sets)
    flat = [t for pair in pairs for t in pair]
    out = _FusedUnion.apply(query, scale, [(s.mask, s.is_causal) for s in key_sets], *flat)  # type: ignore[no-untyped-call]
    return out.reshape(*query_BHTD.shape[:3], -1)  # type: ignore[no-any-return]


class _FusedUnion(torch.autograd.Function):
    """Attention over a union of key sets, one kernel call a set, forward and backward."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, scale: float, views: list[tuple[Mask | None, bool]], *flat: Tensor) -> Tensor:
        merged: Partial | None = None
        for index, (mask, is_causal) in enumerate(views):
            part = _flash_forward(query, flat[2 * index], flat[2 * index + 1], mask, is_causal, scale)
            merged = part if merged is None else merge(merged, part)
        assert merged is not None
        out, lse = merged
        ctx.scale, ctx.views = scale, views
        ctx.save_for_backward(query, out, lse, *flat)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, out, lse, *flat = ctx.saved_tensors
        # A query that saw nothing anywhere: the kernel must not compute exp(score + inf).
        lse = lse.masked_fill(lse == -torch.inf, torch.finfo(torch.float32).max)
        grad_query: Tensor | None = None
        grads_flat: list[Tensor | None] = []
        for index, (mask, is_causal) in enumerate(ctx.views):
            dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, query, flat[2 * index], flat[2 * index + 1], out, lse, 0.0, is_causal,
                attn_mask=None if mask is None else mask.additive, scale=ctx.scale,
            )  # fmt: skip
            grad_query = dq if grad_query is None else grad_query + dq
            grads_flat += [dk, dv]
        return grad_query, None, None, *grads_flat


def _flash_forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask | None, is_causal: bool, scale: float
) -> Partial:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=None if mask is None else mask.additive, scale=scale
    )
    if mask is not None and mask.blind is not None:
        # The kernel says 0 for a query that sees nothing; the merge needs -inf.
        lse = lse.masked_fill(mask.blind, -torch.inf)
        out = out.masked_fill(mask.blind[..., None], 0.0)
    return Partial(out, lse)
