"""(IA)^3 (Liu et al. 2022, arXiv 2205.05638, section 3.3): keys, values and inner activations, rescaled.

    softmax(Q (l_k * K)^T / sqrt(d)) (l_v * V)        (l_ff * g(W_1 x)) W_2

with learned vectors over all heads' width, the same at every position. They start at one: the base exactly. Keys and
values are scaled where they are projected, before rotary positions and with their bias; l_ff where W_2 takes its input,
which is the output of the gate where there is one (in gated layers such as T5 v1.1's, scaling W_1's output comes to the
same).

Axes: I width that a layer takes, O width that it gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field
from torch import Tensor

from antefix.base import Base
from antefix.errors import PrefixError
from antefix.methods.at_linear import AtLinear
from antefix.methods.base import MethodConfig
from antefix.parts.label_head import LabelHead
from antefix.parts.linear import LinearPart
from antefix.parts.site_tensors import Shapes
from antefix.sites import KINDS, Kind, LinearSite, Sites, find_sites
from antefix.tensor_file import TENSORS_FILE, read_tensors


class IA3Config(MethodConfig):
    """The choices of (IA)^3."""

    sites: tuple[Kind, ...] = KINDS
    """Whose keys, values and feed-forward layers are scaled, of what the base has: `self`, `encoder_self`, `cross`."""
    feed_forward: bool = True
    """Whether inner activations of feed-forward layers are scaled."""
    initial_prefix: str | None = None
    """Start from the vectors of a kept prefix of this method (its folder), in the place of ones."""
    initial_scale: float = Field(0.0, ge=0)
    """Standard deviation of the first values, around 1; 0: the base exactly."""

    @property
    def parent(self) -> str | None:
        return self.initial_prefix


class IA3(AtLinear[LinearSite]):
    """Three vectors a block, five where a block has cross-attention."""

    Config = IA3Config
    summary = "keys, values and inner activations rescaled ((IA)^3 of T-Few, Liu et al. 2022)"
    paper = "arXiv 2205.05638"
    parts = ("scales",)

    @classmethod
    def default_learning_rate(cls, config: Any) -> float:
        """3e-3: the number of section 3.5, there of Adafactor, whose steps are scaled by a parameter's size."""
        return 3e-3

    @classmethod
    def chosen_sites(cls, sites: Sites, config: Any) -> Sequence[LinearSite]:
        """Raises PrefixError where the base's blocks have no such layers."""
        of_kinds = [s for s in sites.layers.linear if s.kind in config.sites]
        chosen = [s for s in of_kinds if s.key or s.value or (config.feed_forward and s.role == "feed_forward_out")]
        if not chosen:
            raise PrefixError(f"the base has no keys and values of kind {', '.join(config.sites)} to scale")
        return chosen

    @classmethod
    def build(cls, base: Base, config: Any) -> Self:
        """Raises PrefixError where the prefix to start from has other tensors."""
        module = super().build(base, config)
        if config.initial_prefix is None:
            return module
        _, tensors = LabelHead.apart(read_tensors(Path(config.initial_prefix) / TENSORS_FILE))
        return cls.restore(find_sites(base.model), config, tensors).requires_grad_(True).train()

    @classmethod
    def shapes(cls, site: LinearSite, config: Any) -> Shapes:
        if site.role == "feed_forward_out":
            return {"scale": (site.width_in,)}
        widths = {"key_scale": len(site.key), "value_scale": len(site.value)}
        return {name: (width,) for name, width in widths.items() if width}

    @classmethod
    def initial(cls, part: str, shape: tuple[int, ...], config: Any) -> Tensor:
        scale: float = config.initial_scale
        return 1 + scale * torch.randn(shape)

    def part(self, site: LinearSite, tensors: Mapping[str, Tensor]) -> LinearPart:
        if site.role == "feed_forward_out":
            return LinearPart(input_scale_I=tensors["scale"])
        some = next(iter(tensors.values()))
        scale = torch.ones(site.width_out, dtype=some.dtype, device=some.device)
        for name, columns in (("key_scale", site.key), ("value_scale", site.value)):
            if columns:
                scale = scale.index_copy(0, torch.tensor(columns, device=some.device), tensors[name])
        return LinearPart(output_scale_O=scale)
