"""Adapters: narrow networks after layers, or beside them.

    h <- h + s (W_u g(W_d x + b_d) + b_u)

- `houlsby` (Houlsby et al. 2019, arXiv 1902.00751): x = h, what attention's output projection and the last feed-forward
  layer give, before the residual addition; with `train_norms` the blocks' layer norms are trained too, as there.
- `pfeiffer` (Pfeiffer et al. 2020, arXiv 2005.00247): after the feed-forward layers alone.
- `parallel` (He et al. 2022, arXiv 2110.04366): x is what the feed-forward layers take, h what they give.

W_u and the biases start at zero, W_d uniform as torch makes linear layers: the base exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from antefix.errors import PrefixError
from antefix.methods.at_linear import AtLinear, Layer
from antefix.methods.base import MethodConfig
from antefix.parts.linear import LinearPart, Network, Reads
from antefix.parts.site_tensors import Shapes
from antefix.sites import KINDS, Kind, NormSite, Sites


class AdapterConfig(MethodConfig):
    """The choices of adapters."""

    form: Literal["houlsby", "pfeiffer", "parallel"] = "pfeiffer"
    """Where they stand: after attention and feed-forward layers, after the latter alone, or beside them."""
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


class Adapter(AtLinear[Layer]):
    """A network a layer."""

    Config = AdapterConfig
    summary = "narrow networks after or beside layers (adapters, Houlsby et al. 2019, Pfeiffer et al. 2020)"
    paper = "arXiv 1902.00751, 2005.00247, 2110.04366"
    parts = ("networks of states",)

    @classmethod
    def default_learning_rate(cls, config: Any) -> float:
        """3e-3: the number that T-Few trains adapters with, there of Adafactor."""
        return 3e-3

    @classmethod
    def chosen_sites(cls, sites: Sites, config: Any) -> Sequence[Layer]:
        """Raises PrefixError where the base has no layers of the kinds."""
        roles = ("attention_out", "feed_forward_out") if config.form == "houlsby" else ("feed_forward_out",)
        layers = [s for s in sites.layers.linear if s.role in roles and s.kind in config.sites]
        if not layers:
            raise PrefixError(f"the base has no layers of kind {', '.join(config.sites)} to stand after")
        return [*layers, *(n for n in sites.layers.norms if config.train_norms and n.in_block)]

    @classmethod
    def shapes(cls, site: Layer, config: Any) -> Shapes:
        if isinstance(site, NormSite):
            return {"norm_scale": (site.width,)} | ({"norm_bias": (site.width,)} if site.has_bias else {})
        width = site.width_out  # of the residual stream, which feed-forward layers take too
        return {"down": (config.width, width), "down_bias": (config.width,), "up": (width, config.width),
                "up_bias": (width,)}  # fmt: skip

    @classmethod
    def initial(cls, part: str, shape: tuple[int, ...], config: Any) -> Tensor:
        if part == "down":
            return torch.nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5))
        if part == "norm_scale":
            return torch.ones(shape)
        return torch.randn(shape) * config.initial_scale if part == "up" else torch.zeros(shape)

    def part(self, site: Layer, tensors: Mapping[str, Tensor]) -> LinearPart:
        if isinstance(site, NormSite):
            return LinearPart(output_scale_O=tensors["norm_scale"], bias_O=tensors.get("norm_bias"))
        reads: Reads = "feed_forward_input" if self.config.form == "parallel" else "output"
        scale = self.config.scale
        network = Network(tensors["down"], scale * tensors["up"], tensors["down_bias"], scale * tensors["up_bias"])
        return LinearPart(networks=((reads, self.config.activation, network),))
