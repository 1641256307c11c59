"""Adapters: narrow networks behind layers, or beside them.

    h <- h + s (W_u g(W_d x + b_d) + b_u)

- `houlsby` (Houlsby et al. 2019, arXiv 1902.00751): x = h, what attention's output projection and the last feed-forward
  layer give, before the residual addition; with `train_norms` the blocks' layer norms are trained too, as there.
- `pfeiffer` (Pfeiffer et al. 2020, arXiv 2005.00247): behind the feed-forward layers alone.
- `parallel` (He et al. 2022, arXiv 2110.04366): x is what the feed-forward layers take, h what they give.

W_u and the biases start at zero, W_d uniform as torch makes linear layers: the base exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from antefix.base import Base
from antefix.errors import PrefixError
from antefix.methods.base import MethodConfig, MethodModule
from antefix.parts.linear import LinearPart, Network, Reads
from antefix.parts.site_tensors import Shapes, SiteTensors, checked
from antefix.sites import KINDS, Kind, LinearSite, Sites, find_sites


class AdapterConfig(MethodConfig):
    """The choices of adapters."""

    form: Literal["houlsby", "pfeiffer", "parallel"] = "pfeiffer"
    """Where they stand: behind attention and feed-forward layers, behind the latter alone, or beside them."""
    width: int = Field(16, ge=1)
    """Of a network's hidden layer."""
    activation: Literal["relu", "gelu"] = "relu"
    """Of that layer."""
    scale: float = Field(1.0, gt=0)
    """What the network's output is multiplied by; 4 for `parallel` in the paper."""
    train_norms: bool = False
    """Whether the blocks' layer norms are trained too: a factor and, where they have one, a bias."""
    sites: tuple[Kind, ...] = KINDS
    """Which blocks get them, of what the base has: `self`, `encoder_self`, `cross`."""
    initial_scale: float = Field(0.0, ge=0)
    """Standard deviation of W_u's first values; 0: the base exactly."""


class Adapter(MethodModule):
    """A network a layer."""

    Config = AdapterConfig
    summary = "narrow networks behind or beside layers (adapters, Houlsby et al. 2019, Pfeiffer et al. 2020)"
    paper = "arXiv 1902.00751, 2005.00247, 2110.04366"
    parts = ("networks of states",)

    def __init__(self, config: Any, shapes: Mapping[str, Shapes], tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.config = config
        self._layers = list(shapes)
        self._tensors = SiteTensors(tensors)

    @classmethod
    def default_learning_rate(cls, config: Any) -> float:
        """3e-3, as T-Few trains adapters."""
        return 3e-3

    @classmethod
    def build(cls, base: Base, config: Any) -> Self:
        shapes = _shapes(find_sites(base.model), config)
        tensors = {f"{n}.{p}": _initial(p, s, config) for n, of_layer in shapes.items() for p, s in of_layer.items()}
        return cls(config, shapes, tensors)

    @classmethod
    def restore(cls, sites: Sites, config: Any, tensors: Mapping[str, Tensor]) -> Self:
        shapes = _shapes(sites, config)
        flat = {f"{n}.{p}": shape for n, of_layer in shapes.items() for p, shape in of_layer.items()}
        return cls(config, shapes, checked(tensors, flat)).requires_grad_(False).eval()

    def linear_parts(self) -> dict[str, LinearPart]:
        return {name: self._part(self._tensors.at(name)) for name in self._layers}

    def _part(self, tensors: Mapping[str, Tensor]) -> LinearPart:
        if "down" not in tensors:
            return LinearPart(output_scale_O=tensors["norm_scale"], bias_O=tensors.get("norm_bias"))
        reads: Reads = "feed_forward_input" if self.config.form == "parallel" else "output"
        scale = self.config.scale
        network = Network(tensors["down"], scale * tensors["up"], tensors["down_bias"], scale * tensors["up_bias"])
        return LinearPart(networks=((reads, self.config.activation, network),))

    def kept_tensors(self) -> dict[str, Tensor]:
        return self._tensors.kept()


def _shapes(sites: Sites, config: AdapterConfig) -> dict[str, Shapes]:
    """Of the tensors at every layer. Raises PrefixError where the base has none of the kinds."""
    layers = sites.layers
    shapes: dict[str, Shapes] = {s.name: _of_network(sites, s, config) for s in _chosen(layers.linear, config)}
    if not shapes:
        raise PrefixError(
            f"the base has no layers of kind {', '.join(config.sites)} that an adapter could stand behind"
        )
    if config.train_norms:
        for norm in (n for n in layers.norms if n.in_block):
            shapes[norm.name] = {"norm_scale": (norm.width,)} | ({"norm_bias": (norm.width,)} if norm.has_bias else {})
    return shapes


def _chosen(sites: Sequence[LinearSite], config: AdapterConfig) -> list[LinearSite]:
    roles = ("attention_out", "feed_forward_out") if config.form == "houlsby" else ("feed_forward_out",)
    return [s for s in sites if s.role in roles and s.kind in config.sites]


def _of_network(sites: Sites, site: LinearSite, config: AdapterConfig) -> Shapes:
    width_in = site.width_out
    if config.form == "parallel":
        first = sites.feed_forward_input_of(site.name)
        width_in = next(s.width_in for s in sites.layers.linear if s.name == first)
    return {
        "down": (config.width, width_in),
        "down_bias": (config.width,),
        "up": (site.width_out, config.width),
        "up_bias": (site.width_out,),
    }


def _initial(part: str, shape: tuple[int, ...], config: AdapterConfig) -> Tensor:
    if part == "down":
        return torch.nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5))
    if part == "norm_scale":
        return torch.ones(shape)
    return torch.randn(shape) * config.initial_scale if part == "up" else torch.zeros(shape)
