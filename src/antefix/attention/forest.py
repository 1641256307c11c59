"""Attention over a forest: many texts laid end to end in one row, what they begin with in common laid down once.

Every token names the token that stands before it in its own text, its *parent*; it sees itself and its ancestors. A
tree is a source with its targets, a forest all trees of a batch. No token is padding, so that whatever a model does a
token costs what the tokens cost. Only attention needs rows, and takes them apart here; see `antefix.attention.runs`.

The forest travels through the model in the place of a mask, as whole numbers of shape (1, 1, 3, T): the parents (-1
where a tree begins), the window (how many tokens back a token sees, itself counted), and whether a token is a target's
(1) or stands in the source (0). What stands before the trees and was computed once and for all can be planted under
them (`plant`): keys and values that every token of a tree sees.

Two forms, equal in value and gradient: `_attend_runs` goes through `attend`, `_FusedRuns` keeps less and copies less.

Axes: B rows (one), T tokens of the forest, N trees, R runs of a group, Q queries of a run, S keys of a run, P slots,
H query heads, G key/value heads, D key width, E value width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from antefix.attention.attend import attend, attend_partial
from antefix.attention.partial import KeySet, Mask, Partial, Scores, additive_of_slots, fused_kernel_fits
from antefix.attention.runs import ROOT, Runs, groups_of

NO_WINDOW = 2**31 - 1
_ATTRIBUTE = "antefix_forest"


def forest_mask(parents: Sequence[int], window: int | None, is_target: Sequence[bool] | None = None) -> Tensor:
    """What a model is given as `attention_mask` for these tokens: parents come before their children.

    is_target: which tokens see what only targets see; None: all.
    """
    roles = [True] * len(parents) if is_target is None else is_target
    return torch.tensor([parents, [window or NO_WINDOW] * len(parents), roles])[None, None]


def is_forest(mask: Tensor | None) -> bool:
    """Whether this `attention_mask` is a forest."""
    return mask is not None and mask.ndim == 4 and mask.dtype == torch.long


def forest_of(mask: Tensor) -> Forest:
    """The forest that a mask describes; made once, for all layers of a forward pass and its backward."""
    forest: Forest | None = mask.__dict__.get(_ATTRIBUTE)
    if forest is None:
        forest = mask.__dict__[_ATTRIBUTE] = Forest.of(mask)
    return forest


def plant(mask: Tensor, keys: Mapping[Any, KeySet]) -> None:
    """Put keys and values under the trees of a forest: what stands before a tree's first token in its text.

    keys: for every attention module one set of N rows, tree by tree. They are constants.
    """
    forest_of(mask).planted.update(keys)


@dataclass(frozen=True)
class Forest:
    """Trees of tokens, taken apart in the way that attention needs when it is first asked."""

    parents: list[int]
    """Of every token; -1 where a tree begins."""
    trees: list[int]
    """Of every token."""
    window: int
    is_target: Tensor
    """(T,)"""
    planted: dict[Any, KeySet] = field(default_factory=dict)
    """By attention module: what stands before the trees, N rows; see `plant`."""
    _gatherings: dict[tuple[int, bool, int, int], _Gathering] = field(default_factory=dict)
    _latest_masks: dict[tuple[Any, ...], list[Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, mask: Tensor) -> Forest:
        """From `forest_mask`."""
        parents, window = mask[0, 0, 0].tolist(), int(mask[0, 0, 1, 0])
        trees: list[int] = []
        for parent in parents:
            trees.append((trees[-1] + 1 if trees else 0) if parent == ROOT else trees[parent])
        return cls(parents, trees, window, mask[0, 0, 2].bool())

    @property
    def num_trees(self) -> int:
        return self.trees[-1] + 1

    @cached_property
    def tree_of_token(self) -> Tensor:
        """(T,)"""
        return torch.tensor(self.trees, device=self.is_target.device)

    @cached_property
    def groups(self) -> list[Runs]:
        """Runs in groups of like lengths."""
        return groups_of(self.parents, self.trees, self.window, self.is_target.device)

    @cached_property
    def place_of_token(self) -> Tensor:
        """(T,) where a token's query stands when all groups' queries (R times Q) are laid end to end."""
        token = torch.cat([group.queries.flatten() for group in self.groups])
        real = torch.cat([group.is_query.flatten() for group in self.groups]).nonzero().squeeze(1)
        place = torch.empty(len(self.parents), dtype=torch.long, device=token.device)
        place[token[real]] = real
        return place

    def attend(self, query_1HTD: Tensor, tokens: KeySet, slots: Sequence[KeySet], scores: Scores) -> Tensor:
        """Attention of every token over what it sees and over its tree's slots: 1, H, T, E.

        slots: key sets of N rows, or of one that all trees share.
        """
        slots = [s for s in slots if s.key_BGSD.shape[2] > 0]
        query_THD, key_TGD, value_TGE = (x[0].transpose(0, 1) for x in (query_1HTD, tokens.key_BGSD, tokens.value_BGSE))
        if scores.plain and fused_kernel_fits(query_1HTD, tokens.value_BGSE):
            out_THE = self._fused(query_THD, key_TGD, value_TGE, slots, scores.scale)
        else:
            out_THE = self._attend_runs(query_THD, key_TGD, value_TGE, slots, scores)
        return out_THE.transpose(0, 1)[None]

    def partial(self, query_1HTD: Tensor, tokens: KeySet, slots: Sequence[KeySet], scores: Scores) -> Partial:
        """The same with its normaliser."""
        query, key, value = (x[0].transpose(0, 1) for x in (query_1HTD, tokens.key_BGSD, tokens.value_BGSE))
        parts = [attend_partial(*of_runs, scores) for of_runs in self._by_group(query, key, value, slots)]
        out, lse = (torch.cat([x.transpose(1, 2).flatten(0, 1) for x in xs]) for xs in zip(*parts, strict=True))
        return Partial(*(x[self.place_of_token].transpose(0, 1)[None] for x in (out, lse)))

    def _fused(self, query: Tensor, key: Tensor, value: Tensor, slots: Sequence[KeySet], scale: float) -> Tensor:
        num_rows = max((s.key_BGSD.shape[0] for s in slots), default=1)
        num_slots = sum(s.key_BGSD.shape[2] for s in slots)
        G = key.shape[1]
        made_for = (num_slots, num_rows > 1, G, query.shape[1] // G)
        gathering = self._gatherings.get(made_for)
        if gathering is None:
            gathering = self._gatherings[made_for] = _Gathering.of(self, *made_for)
        side_by_side = [
            torch.cat([x.expand(num_rows, -1, -1, -1) for x in parts], dim=2).transpose(1, 2).float()
            for parts in ([s.key_BGSD for s in slots], [s.value_BGSE for s in slots]) if parts
        ]  # fmt: skip
        masks = self._masks(gathering, made_for, slots, num_rows)
        out: Tensor = _FusedRuns.apply(gathering, scale, masks, query, key, value, *side_by_side)  # type: ignore[no-untyped-call]
        return out

    def _masks(
        self, gathering: _Gathering, made_for: tuple[int, bool, int, int], slots: Sequence[KeySet], num_rows: int
    ) -> list[Tensor]:
        """The gathering's, and what queries do not see of these slots; made once for layers with like slots."""
        if all(s.mask is None and not s.for_targets for s in slots):
            return gathering.masks
        key = (made_for, *((s.mask, s.for_targets, s.key_BGSD.shape[2]) for s in slots))
        if key not in self._latest_masks:
            self._latest_masks.clear()
            heads = made_for[3]
            self._latest_masks[key] = [
                _with_slot_mask(mask, torch.cat([self._seen_slots(s, runs, num_rows, heads) for s in slots], dim=-1))
                for mask, runs in zip(gathering.masks, self.groups, strict=True)
            ]
        return self._latest_masks[key]

    def _seen_slots(self, slots: KeySet, runs: Runs, num_rows: int, heads: int) -> Tensor:
        """0 or -inf, (R, 1, Q * heads, P)."""
        (R, Q), P = runs.queries.shape, slots.key_BGSD.shape[2]
        trees = runs.trees if num_rows > 1 else torch.zeros_like(runs.trees)
        seen = additive_of_slots(slots, num_rows)[trees][:, None, None].expand(R, 1, Q * heads, P)
        if slots.for_targets:
            is_source = ~self.is_target[runs.queries].repeat_interleave(heads, dim=1)
            seen = seen.masked_fill(is_source[:, None, :, None], -torch.inf)
        return seen

    def _attend_runs(
        self, query: Tensor, key: Tensor, value: Tensor, slots: Sequence[KeySet], scores: Scores
    ) -> Tensor:
        outs = [attend(*of_runs, scores) for of_runs in self._by_group(query, key, value, slots)]
        return torch.cat([out.transpose(1, 2).flatten(0, 1) for out in outs])[self.place_of_token]

    def _by_group(
        self, query: Tensor, key: Tensor, value: Tensor, slots: Sequence[KeySet]
    ) -> Iterator[tuple[Tensor, KeySet, list[KeySet]]]:
        """Of every group: queries, tokens, and slots as they are seen."""
        for group in self.groups:
            rows = [x[i].transpose(1, 2) for x, i in ((query, group.queries), (key, group.keys), (value, group.keys))]
            mask, is_target = Mask(group.additive.to(query.dtype), None), self.is_target[group.queries]
            seen = [_of_trees(s, group.trees).seen_by(is_target) for s in slots]
            yield rows[0], KeySet(rows[1], rows[2], mask), seen


def _of_trees(slots: KeySet, trees: Tensor) -> KeySet:
    """The slots of every run's tree."""
    if slots.key_BGSD.shape[0] == 1:
        return slots
    mask = None if slots.mask is None else Mask(slots.mask.additive[trees], _taken(slots.mask.blind, trees))
    return slots._replace(key_BGSD=slots.key_BGSD[trees], value_BGSE=slots.value_BGSE[trees], mask=mask)


def _taken(blind: Tensor | None, trees: Tensor) -> Tensor | None:
    return None if blind is None else blind[trees]


def _with_slot_mask(mask: Tensor, slots_R1QP: Tensor) -> Tensor:
    mask = mask.clone()
    mask[..., : slots_R1QP.shape[-1]] = slots_R1QP
    return mask


@dataclass(frozen=True, slots=True)
class _Gathering:
    """Where every row of a fused computation comes from and goes to, for so many slots and heads.

    What is gathered for all groups lies end to end; `shapes` cuts it. Slots stand before the tokens, as if they were
    tokens: first those of tree 0, then of tree 1, or one lot for all.
    """

    queries: Tensor
    """Of all (R, G, Q, heads of a group): the place in (T + 1, H); the last place, T, is padding's."""
    tokens: Tensor
    """The other way: of all (T, H) the place among the queries."""
    keys: Tensor
    """Of all (R, P + S): the place in (slots, T)."""
    shapes: list[tuple[int, int, int]]
    """Of every group: R, Q times heads of a group, P + S."""
    masks: list[Tensor]
    """Of every group: (R, 1, Q * heads, P + S), additive."""

    @classmethod
    def of(cls, forest: Forest, num_slots: int, trees_differ: bool, G: int, heads: int) -> _Gathering:
        device, T = forest.tree_of_token.device, len(forest.tree_of_token)
        head_Gh = torch.arange(G * heads, device=device).view(G, heads)
        slot_P = torch.arange(num_slots, device=device)
        num_first = num_slots * (forest.num_trees if trees_differ else 1)
        queries, keys, shapes, masks = [], [], [], []
        for runs in forest.groups:
            (R, Q), S = runs.queries.shape, runs.keys.shape[1]
            token_RQ = runs.queries.masked_fill(~runs.is_query, T)
            queries.append((token_RQ[:, None, :, None] * (G * heads) + head_Gh[:, None]).flatten())
            first_R = runs.trees * num_slots if trees_differ else torch.zeros_like(runs.trees)
            keys.append(torch.cat([first_R[:, None] + slot_P, runs.keys + num_first], dim=1).flatten())
            shapes.append((R, Q * heads, num_slots + S))
            masks.append(pad(runs.additive, (num_slots, 0)).repeat_interleave(heads, dim=2))
        query = torch.cat(queries)
        real = query < T * G * heads
        tokens = torch.empty(T * G * heads, dtype=torch.long, device=device)
        tokens[query[real]] = real.nonzero().squeeze(1)
        return cls(query, tokens, torch.cat(keys), shapes, masks)

    def query_rows(self, x_THD: Tensor) -> list[Tensor]:
        """(R, G, Q * heads, D) of every group; 0 where a query is padding."""
        padded = pad(x_THD.float(), (0, 0, 0, 0, 0, 1))
        rows = padded.flatten(0, 1).index_select(0, self.queries)
        G = len(rows) // sum(R * q for R, q, _ in self.shapes)
        parts = torch.split(rows, [R * G * q for R, q, _ in self.shapes])
        return [part.view(R, G, q, -1) for part, (R, q, _) in zip(parts, self.shapes, strict=True)]

    def key_rows(self, x_TGD: Tensor, slots: Sequence[Tensor]) -> list[Tensor]:
        """(R, G, P + S, D) of every group."""
        rows = torch.cat([*(s.flatten(0, 1) for s in slots), x_TGD.float()]).flatten(1).index_select(0, self.keys)
        parts = torch.split(rows, [R * s for R, _, s in self.shapes])
        shape = x_TGD.shape[1:]
        return [p.view(R, s, *shape).transpose(1, 2) for p, (R, _, s) in zip(parts, self.shapes, strict=True)]

    def of_tokens(self, rows: Sequence[Tensor], like_THD: Tensor) -> Tensor:
        """(T, H, D) from the query rows of every group."""
        T, H, _ = like_THD.shape
        D = rows[0].shape[-1]
        return torch.cat([r.reshape(-1, D) for r in rows]).index_select(0, self.tokens).view(T, H, D).to(like_THD.dtype)

    def summed(self, rows: Sequence[Tensor], num_rows: int) -> Tensor:
        """Of the key rows of every group: the sum for every slot and token, (num_rows, G, D)."""
        taken = torch.cat([r.transpose(1, 2).flatten(0, 1).flatten(1) for r in rows])
        total = taken.new_zeros(num_rows, taken.shape[1])
        return total.index_add_(0, self.keys, taken).view(num_rows, *rows[0].shape[1::2])


class _FusedRuns(torch.autograd.Function):
    """The flash kernel on every group, in float32; rows are gathered anew in the backward pass, not kept.

    The heads of a group stand side by side as queries, so that no key is repeated for them. bfloat16 goes through
    float32: on a processor that is the faster kernel.
    """

    @staticmethod
    def forward(
        ctx: Any, gathering: _Gathering, scale: float, masks: list[Tensor], query: Tensor, key: Tensor, value: Tensor,
        *slots: Tensor,
    ) -> Tensor:  # fmt: skip
        """slots: keys (N or 1, P, G, D) and values of all slots."""
        outs, normalisers = [], []
        rows = (
            gathering.query_rows(query),
            gathering.key_rows(key, slots[0::2]),
            gathering.key_rows(value, slots[1::2]),
        )
        for q, k, v, mask in zip(*rows, masks, strict=True):
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, False, attn_mask=mask, scale=scale
            )
            outs.append(out)
            normalisers.append(lse)
        out_THE = gathering.of_tokens(outs, query)
        ctx.gathering, ctx.scale, ctx.masks = gathering, scale, masks
        ctx.save_for_backward(query, key, value, out_THE, *normalisers, *slots)
        return out_THE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THE: Tensor) -> tuple[Tensor | None, ...]:
        gathering: _Gathering = ctx.gathering
        query, key, value, out_THE, *rest = ctx.saved_tensors
        normalisers, slots = rest[: len(ctx.masks)], rest[len(ctx.masks) :]
        grads = []
        rows = (
            gathering.query_rows(grad_THE), gathering.query_rows(query), gathering.key_rows(key, slots[0::2]),
            gathering.key_rows(value, slots[1::2]), gathering.query_rows(out_THE),
        )  # fmt: skip
        for grad, q, k, v, out, lse, mask in zip(*rows, normalisers, ctx.masks, strict=True):
            grads.append(
                torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    grad, q, k, v, out, lse, 0.0, False, attn_mask=mask, scale=ctx.scale
                )
            )
        dq, dk, dv = zip(*grads, strict=True)
        num_first = slots[0].shape[0] * slots[0].shape[1] if slots else 0
        grad_key, grad_value = (gathering.summed(d, num_first + len(key)) for d in (dk, dv))
        of_slots = [g[:num_first].view(s.shape) for g, s in zip((grad_key, grad_value), slots, strict=False)]
        if not any(ctx.needs_input_grad[3:6]):  # at the lowest slots nothing flows on
            return (None, None, None, None, None, None, *of_slots)
        return (
            None, None, None, gathering.of_tokens(dq, query), grad_key[num_first:].to(key.dtype),
            grad_value[num_first:].to(value.dtype), *of_slots,
        )  # fmt: skip
