"""What methods share that are a few tensors at every one of some linear layers and the part made of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic

from torch import Tensor

from antefix.methods.at_places import AtPlaces, P
from antefix.parts.linear import LinearPart
from antefix.sites import LinearSite, NormSite

Layer = LinearSite | NormSite


class AtLinear(AtPlaces[P], Generic[P]):
    """A method gives the part that its tensors make at a layer."""

    def part(self, site: P, tensors: Mapping[str, Tensor]) -> LinearPart:
        """What these tensors do at the layer."""
        raise NotImplementedError

    def linear_parts(self) -> dict[str, LinearPart]:
        return {site.name: self.part(site, self._tensors.at(site.name)) for site in self._places}
