"""What acts at an attention site in another way than by fixed keys and values.

A branch is asked once a call and answers with an effect:

- `Share`: it takes part in the softmax. It adds e^shift num to the numerator of the softmax-weighted mean and
  e^shift mass to its denominator (He et al. 2022, arXiv 2110.04366, equations 7-8).
- `Addend`: it is added to the merged attention, before the output projection.
- `Residual`: it is added to what the output projection gives.

A branch is asked for the queries that carry it alone: some rows of a batch, or the tokens of some trees of a forest.

Axes: B rows, T queries, P slots, H query heads, D key width, E value width, C width of hidden states, X any width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from antefix.attention.partial import Partial, Scores
from antefix.errors import PrefixError


class Share(NamedTuple):
    """A part in the softmax, float32; with a shift of -inf it is none."""

    num_BHTE: Tensor
    mass_BHT: Tensor
    shift_BHT: Tensor


class Addend(NamedTuple):
    """Added before the output projection."""

    out_BHTE: Tensor


class Residual(NamedTuple):
    """Added after the output projection."""

    out_BTC: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where the queries of a pass stand in their texts; every tensor is (B or 1, T).

    A text is a source and a target. A source's last token stands first in the target here: it predicts that token.
    """

    is_source: Tensor
    """A source's token, but for its last."""
    is_target: Tensor
    """A target's; what is neither is padding."""
    index: Tensor
    """Among the tokens of the same part of its text, from 0."""
    source_length: Tensor
    """How many tokens the source part of its text has."""
    text: Tensor
    """Which text of the batch it belongs to."""
    num_texts: int
    begins: bool
    """Whether texts begin in this pass; else what was learned of their beginning is in `Call.memory`."""
    sources_end: bool = True
    """Whether all sources are read when this pass is."""

    @property
    def is_prompt(self) -> Tensor:
        """All of a source, its last token included (an encoder's text; a decoder's start token)."""
        return self.is_source | (self.is_target & (self.index == 0))


class Subset(NamedTuple):
    """Some of the queries of a call: rows, or in a forest, which is one row, tokens."""

    which: Tensor
    of_tokens: bool

    def of(self, x: Tensor, token_axis: int) -> Tensor:
        """Their part of a tensor with rows first; one row stands for all."""
        axis = self._axis(token_axis)
        return x if axis == 0 and len(x) == 1 else x.index_select(axis, self.which)

    def spread(self, x: Tensor, token_axis: int, size: int, rest: float) -> Tensor:
        """What `of` gave in its places among so many, and `rest` elsewhere."""
        axis = self._axis(token_axis)
        shape = [size if n == axis else length for n, length in enumerate(x.shape)]
        return x.new_full(shape, rest).index_copy(axis, self.which, x)

    def _axis(self, token_axis: int) -> int:
        return token_axis if self.of_tokens else 0


class Condition(NamedTuple):
    """What second texts of the rows are: states of so many tokens, and which of them are there."""

    states_BPC: Tensor
    is_there_BP: Tensor

    def of_rows(self, num_rows: int) -> Condition:
        """Repeated for a batch of so many rows (beams)."""
        repeats = num_rows // len(self.states_BPC)
        return Condition(*(x.repeat_interleave(repeats, dim=0) for x in self))


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One attention call as a branch gets it."""

    query_BHTD: Tensor
    """As attention gets it: after rotary embedding."""
    scores: Scores
    tokens: Callable[[], Partial]
    """Attention over the tokens alone, computed when first asked for."""
    places: Callable[[], Places]
    """Raises PrefixError where nobody said where sources end."""
    hidden: Callable[[], Tensor]
    """The layer's input (B, T, C), for branches that say `needs_hidden_states`."""
    condition: Callable[[], Condition]
    """Of the rows' second texts. Raises PrefixError where nobody gave them."""
    memory: dict[str, Tensor] = field(default_factory=dict)
    """What this branch keeps from the beginning of texts to their continuation."""

    def at(self, subset: Subset) -> Call:
        """The same call for some of its queries. Texts keep their numbers, so that what is kept of them is found."""

        def places() -> Places:
            p = self.places()
            is_source, is_target, index, source_length, text = (
                subset.of(x, 1) for x in (p.is_source, p.is_target, p.index, p.source_length, p.text)
            )
            return replace(
                p, is_source=is_source, is_target=is_target, index=index, source_length=source_length, text=text
            )

        def condition() -> Condition:
            return self.condition() if subset.of_tokens else Condition(*(subset.of(x, 1) for x in self.condition()))

        return replace(
            self,
            query_BHTD=subset.of(self.query_BHTD, 2),
            tokens=lambda: Partial(*(subset.of(x, 2) for x in self.tokens())),
            places=places,
            hidden=lambda: subset.of(self.hidden(), 1),
            condition=condition,
        )

    def whole_prompt(self) -> Tensor:
        """Which tokens are a prompt's. Raises PrefixError where this pass reads only a part of some source."""
        places = self.places()
        if places.begins and not places.sources_end:
            raise PrefixError(
                "what is attached looks at the whole of a source before it acts: let sources be read in one pass "
                "(no prefill_chunk_size)"
            )
        return places.is_prompt

    def of_prompt(self, name: str, value_BTX: Tensor, chosen_BT: Tensor) -> Tensor:
        """The mean of a value over the chosen tokens of every text's beginning, for every query: (B or 1, T, X).

        Kept under this name, and found again when the text goes on.
        """
        places = self.places()
        if places.begins:
            text = places.text.expand(chosen_BT.shape).flatten()
            weight = chosen_BT.flatten().to(value_BTX.dtype)
            chosen = value_BTX.flatten(0, 1) * weight[:, None]
            total = chosen.new_zeros(places.num_texts, chosen.shape[1]).index_add(0, text, chosen)
            count = weight.new_zeros(places.num_texts).index_add(0, text, weight)
            self.memory[name] = total / count.clamp(min=1)[:, None]
        return self.memory[name][places.text]


class Branch:
    """Something learned at one site."""

    needs_hidden_states: bool = False

    def __call__(self, call: Call) -> Share | Addend | Residual:
        """Its effect on every query of the call."""
        raise NotImplementedError

    def tensors(self) -> Sequence[Tensor]:
        """What it is made of, which must not change between a forward pass and the computation of its layers anew."""
        return ()


class Acting(NamedTuple):
    """A branch with the queries that it acts on; None: on all."""

    branch: Branch
    subset: Subset | None
    memory: dict[str, Tensor]
    place: int = 0
    """Among the branches of its prefix. Those of one place, of different prefixes, act on different queries."""


class Attention(NamedTuple):
    """The same attention in two forms, of which one is needed."""

    whole: Callable[[], Tensor]
    """Over tokens and slots, in the fastest form: B, H, T, E."""
    partial: Callable[[], Partial]
    """The same with its normaliser."""


def acted(
    attention: Attention, acting: Sequence[Acting], call: Callable[[dict[str, Tensor]], Call]
) -> tuple[Tensor, Tensor | None]:
    """Attention with the effects of these branches: (B, H, T, E), and what is added after the projection."""
    effects = _joined([(a, *_effect(a, call(a.memory))) for a in acting])
    shares = [e for e in effects if isinstance(e, Share)]
    out = merged(attention.partial(), shares) if shares else attention.whole()
    for addend in (e for e in effects if isinstance(e, Addend)):
        out = out + addend.out_BHTE.to(out.dtype)
    residuals = [e.out_BTC for e in effects if isinstance(e, Residual)]
    return out, torch.stack(residuals).sum(0) if residuals else None


def merged(base: Partial, shares: Sequence[Share]) -> Tensor:
    """One softmax over all: (B, H, T, E), in the precision of the base's output."""
    own = Share(base.out_BHTE.to(base.lse_BHT.dtype), torch.ones_like(base.lse_BHT), base.lse_BHT)
    every = [own, *shares]
    shifts = torch.broadcast_tensors(*(s.shift_BHT for s in every))  # type: ignore[no-untyped-call]
    highest = torch.stack(shifts).amax(0).detach()
    highest = torch.where(highest == -torch.inf, 0.0, highest)  # a query that sees nothing at all
    num, mass = torch.zeros_like(own.num_BHTE), torch.zeros_like(highest)
    for part in every:
        weight = torch.exp(part.shift_BHT - highest)
        num, mass = num + weight[..., None] * part.num_BHTE, mass + weight * part.mass_BHT
    return (num / torch.where(mass > 0, mass, 1.0)[..., None]).to(base.out_BHTE.dtype)


Effect = Share | Addend | Residual

_TOKEN_AXIS: dict[type[Effect], int] = {Share: 2, Addend: 2, Residual: 1}


def _effect(acting: Acting, call: Call) -> tuple[Effect, Tensor]:
    """What it gives, and the queries of the whole call."""
    return acting.branch(call if acting.subset is None else call.at(acting.subset)), call.query_BHTD


def _joined(found: Sequence[tuple[Acting, Effect, Tensor]]) -> list[Effect]:
    """On every query of the call: one effect for all of a kind that stand in one place."""
    whole = [effect for acting, effect, _ in found if acting.subset is None]
    parts: dict[tuple[int, type[Effect]], list[tuple[Subset, Effect]]] = {}
    for acting, effect, _ in found:
        if acting.subset is not None:
            parts.setdefault((acting.place, type(effect)), []).append((acting.subset, effect))
    return whole + [_spread(kind, of_kind, found[0][2]) for (_, kind), of_kind in parts.items()]


def _spread(kind: type[Effect], parts: Sequence[tuple[Subset, Effect]], query_BHTD: Tensor) -> Effect:
    """Effects on unlike queries as one on all; elsewhere it is none."""
    of_tokens, token_axis = parts[0][0].of_tokens, _TOKEN_AXIS[kind]
    everywhere = Subset(torch.cat([subset.which for subset, _ in parts]), of_tokens)
    axis, size = (token_axis, query_BHTD.shape[2]) if of_tokens else (0, len(query_BHTD))
    rest = (0.0, 0.0, -torch.inf) if kind is Share else (0.0,)
    tensors = (torch.cat(of_field, axis) for of_field in zip(*(effect for _, effect in parts), strict=True))
    return kind(*(everywhere.spread(t, token_axis, size, r) for t, r in zip(tensors, rest, strict=True)))
