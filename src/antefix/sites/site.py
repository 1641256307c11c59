"""The words for what a base offers: places where something learned can act.

Attention sites are `(layer, kind)` with kind `self` (decoder, causal), `encoder_self` (an encoder, or a model that sees
both ways) and `cross`. Linear sites are the linear layers of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

from antefix.errors import PrefixError

Kind = Literal["self", "encoder_self", "cross"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PositionKind = Literal["relative", "absolute", "none"]


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
    """The path of what multiplies attention's output, inside the attention module or after it; None: not found."""

    @property
    def name(self) -> str:
        """The site's name in a kept prefix: `layers.3.self`."""
        return f"layers.{self.layer}.{self.kind}"


Role = Literal["attention_in", "attention_out", "feed_forward_in", "feed_forward_out"]


@dataclass(frozen=True, slots=True)
class LinearSite:
    """One linear layer of a block."""

    name: str
    """Its path in the model, which is its name in a kept prefix too: `model.layers.3.self_attn.k_proj`."""
    layer: int
    kind: Kind
    """Of the attention that it belongs to; of the attention to a layer's own tokens, for feed-forward layers."""
    role: Role
    """What it does: makes queries, keys or values; takes attention's output; widens, or narrows again."""
    width_in: int
    width_out: int
    has_bias: bool
    query: tuple[int, ...]
    """Which of its outputs are queries; likewise keys and values. Fused layers have several of the three."""
    key: tuple[int, ...]
    value: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class NormSite:
    """A layer norm over hidden states, in a block or outside."""

    name: str
    """Its path in the model."""
    width: int
    has_bias: bool
    in_block: bool
    feeds: str | None
    """The first linear layer that is given what it gives; None: there is none."""


@dataclass(frozen=True, slots=True)
class Layers:
    """What blocks are made of beside attention."""

    linear: tuple[LinearSite, ...]
    """The linear layers of the blocks, in call order."""
    norms: tuple[NormSite, ...]
    embeddings: str
    """The path of the input embeddings."""
    biased: dict[str, int]
    """Every layer with a bias, inside blocks and outside, but for output heads: its path and its width."""
    blocks: tuple[str, ...]
    """The blocks' paths in call order."""
    after_blocks: tuple[str, ...]
    """The layers with weights that are called after the last block, but for output heads."""
    weights: dict[str, tuple[int, ...]]
    """All weights of the model by their path, tied ones once, with their shapes."""


@dataclass(frozen=True)
class Sites:
    """Everything a method must know of a base's shape."""

    attention: tuple[Site, ...]
    hidden_size: int
    is_encoder_decoder: bool
    positions: PositionKind
    """What moving all positions by a constant does: it turns keys alone (`relative`: rotary), it changes what
    enters the first layer (`absolute`: learned), or it cannot be asked for (`none`: the model takes no
    `position_ids`, or does not count them from 0)."""

    find_layers: Callable[[], Layers] = field(repr=False, compare=False)
    """Looks for `layers`. Raises BaseModelError where the model is gone."""

    @cached_property
    def layers(self) -> Layers:
        """The linear layers of the base's blocks and what else they are made of, looked for when first asked for."""
        return self.find_layers()

    def feed_forward_input_of(self, name: str) -> str:
        """The first of the feed-forward layers that this one belongs to."""
        site = next(s for s in self.layers.linear if s.name == name)
        same = (s for s in self.layers.linear if (s.layer, s.kind) == (site.layer, site.kind))
        return next(s.name for s in same if s.role.startswith("feed_forward"))

    def to_dict(self) -> dict[str, Any]:
        """For JSON: attention, layer by layer, and what holds for all."""
        return {"attention": [asdict(site) for site in self.attention], "hidden_size": self.hidden_size,
                "is_encoder_decoder": self.is_encoder_decoder, "positions": self.positions}  # fmt: skip

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


def sites_of_kinds(sites: Sites, kinds: tuple[Kind, ...]) -> tuple[Site, ...]:
    """The sites of these kinds. Raises PrefixError where the base has none."""
    chosen = sites.of_kinds(kinds)
    if not chosen:
        raise PrefixError(f"the base has no site of kind {', '.join(kinds)}: it has {', '.join(sites.kinds)}")
    return chosen
