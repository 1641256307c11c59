"""LoRA (Hu et al. 2022, arXiv 2106.09685): low-rank matrices beside frozen ones.

    W x + (alpha / r) B A x,  A of shape (r, in), B of shape (out, r)

B starts at zero: the base exactly. A starts uniform as torch makes linear layers, as released. In a fused layer
queries, keys and values get an A and a B of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from antefix.errors import PrefixError
from antefix.methods.at_linear import AtLinear
from antefix.methods.base import MethodConfig
from antefix.parts.linear import Activation, LinearPart, Network, Reads
from antefix.parts.site_tensors import Shapes
from antefix.sites import KINDS, Kind, LinearSite, Sites

Projection = Literal["query", "key", "value", "attention_out", "feed_forward_in", "feed_forward_out"]


class LoraConfig(MethodConfig):
    """The choices of LoRA."""

    rank: int = Field(4, ge=1)
    """Of the matrices: r."""
    alpha: float = Field(8.0, gt=0)
    """What they are multiplied by, divided by the rank; the paper has 32 for E2E."""
    projections: tuple[Projection, ...] = Field(("query", "value"), min_length=1)
    """The layers that get them: `query`, `key`, `value`, `attention_out`, `feed_forward_in`, `feed_forward_out`."""
    sites: tuple[Kind, ...] = KINDS
    """Where, of what the base has: `self`, `encoder_self`, `cross`."""
    initial_scale: float = Field(0.0, ge=0)
    """Standard deviation of B's first values; 0: the base exactly."""


class Lora(AtLinear[LinearSite]):
    """A pair of matrices for every chosen projection."""

    Config = LoraConfig
    summary = "low-rank matrices beside frozen ones (LoRA, Hu et al. 2022)"
    paper = "arXiv 2106.09685"
    parts = ("low-rank matrices",)

    @classmethod
    def default_learning_rate(cls, config: Any) -> float:
        """1e-2: the best of three for 1,000 E2E pairs, with alpha twice the rank (`results/beside_peft/`).

        The paper has 2e-4 for five epochs of E2E (table 11).
        """
        return 1e-2

    @classmethod
    def chosen_sites(cls, sites: Sites, config: Any) -> Sequence[LinearSite]:
        """Raises PrefixError where the base has none of the projections."""
        chosen = [s for s in sites.layers.linear if s.kind in config.sites and _columns(s, config)]
        if not chosen:
            raise PrefixError(f"the base has no {', '.join(config.projections)} of kind {', '.join(config.sites)}")
        return chosen

    @classmethod
    def shapes(cls, site: LinearSite, config: Any) -> Shapes:
        shapes: dict[str, tuple[int, ...]] = {}
        for name, columns in _columns(site, config).items():
            shapes[f"{name}_down"] = (config.rank, site.width_in)
            shapes[f"{name}_up"] = (len(columns), config.rank)
        return shapes

    @classmethod
    def initial(cls, part: str, shape: tuple[int, ...], config: Any) -> Tensor:
        tensor = torch.empty(shape)
        if part.endswith("_down"):
            return torch.nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
        scale: float = config.initial_scale
        return tensor.normal_() * scale

    def part(self, site: LinearSite, tensors: Mapping[str, Tensor]) -> LinearPart:
        scaling = self.config.alpha / self.config.rank
        networks: list[tuple[Reads, Activation, Network]] = []
        for name, columns in _columns(site, self.config).items():
            up = scaling * tensors[f"{name}_up"]
            if len(columns) < site.width_out:  # the others of a fused layer stay as they are
                place = torch.tensor(columns, device=up.device)
                up = up.new_zeros(site.width_out, up.shape[1]).index_copy(0, place, up)
            networks.append(("input", "identity", Network(tensors[f"{name}_down"], up)))
        return LinearPart(networks=tuple(networks))


def _columns(site: LinearSite, config: Any) -> dict[str, Sequence[int]]:
    """The projections of a layer that get matrices, each with its outputs."""
    of_attention = {"query": site.query, "key": site.key, "value": site.value}
    every = of_attention if site.role == "attention_in" else {site.role: range(site.width_out)}
    return {name: columns for name, columns in every.items() if columns and name in config.projections}
