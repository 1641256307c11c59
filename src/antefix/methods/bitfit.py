"""BitFit (Ben Zaken et al. 2022, arXiv 2106.10199): the biases alone are trained, those of layer norms included.

What is learned is what is added to the base's biases, so that rows of a batch can differ in it; it starts at zero, the
base exactly. Biases of output heads (RoBERTa has one) are left out. A base without biases (T5, Llama) gets one at every
linear layer of its blocks, as the released code of T-Few does for T5 (arXiv 2205.05638).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from antefix.base import Base
from antefix.methods.base import MethodConfig, MethodModule
from antefix.parts.linear import LinearPart
from antefix.parts.site_tensors import SiteTensors, checked
from antefix.sites import Sites, find_sites

_PART = "bias"


class BitFitConfig(MethodConfig):
    """The choices of BitFit."""

    biases: Literal["all", "query_and_feed_forward_in"] = "all"
    """Which are trained; the second is the paper's compact choice."""
    initial_scale: float = Field(0.0, ge=0)
    """Standard deviation of the first values; 0: the base exactly."""


class BitFit(MethodModule):
    """A vector for every layer that has a bias, or could have one."""

    Config = BitFitConfig
    summary = "the biases alone (BitFit, Ben Zaken et al. 2022)"
    paper = "arXiv 2106.10199"
    parts = ("biases",)

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._layers = [name.removesuffix(f".{_PART}") for name in tensors]
        self._tensors = SiteTensors(tensors)

    @classmethod
    def default_learning_rate(cls, config: Any) -> float:
        """1e-3, as released."""
        return 1e-3

    @classmethod
    def build(cls, base: Base, config: Any) -> Self:
        shapes = _shapes(find_sites(base.model), config)
        return cls({name: torch.randn(shape) * config.initial_scale for name, shape in shapes.items()})

    @classmethod
    def restore(cls, sites: Sites, config: Any, tensors: Mapping[str, Tensor]) -> Self:
        return cls(checked(tensors, _shapes(sites, config))).requires_grad_(False).eval()

    def linear_parts(self) -> dict[str, LinearPart]:
        return {name: LinearPart(bias_O=self._tensors.named(f"{name}.{_PART}")) for name in self._layers}

    def kept_tensors(self) -> dict[str, Tensor]:
        return self._tensors.kept()


def _shapes(sites: Sites, config: BitFitConfig) -> dict[str, tuple[int, ...]]:
    layers = sites.layers
    widths = layers.biased or {site.name: site.width_out for site in layers.linear}
    if config.biases == "query_and_feed_forward_in":
        chosen = {s.name for s in layers.linear if s.query or s.role == "feed_forward_in"}
        widths = {name: width for name, width in widths.items() if name in chosen}
    return {f"{name}.{_PART}": (width,) for name, width in widths.items()}
