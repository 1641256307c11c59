"""What methods share that are a few tensors at every one of some linear layers and the part made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

from torch import Tensor

from antefix.base import Base
from antefix.methods.base import MethodModule
from antefix.parts.linear import LinearPart
from antefix.parts.site_tensors import Shapes, SiteTensors, checked
from antefix.sites import LinearSite, Sites, find_sites


class AtLinear(MethodModule):
    """A method chooses layers, gives the shapes of its tensors there, their first values, and the part they make."""

    def __init__(self, config: Any, sites: Sequence[LinearSite], tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.config = config
        self._sites = list(sites)
        self._tensors = SiteTensors(tensors)

    @classmethod
    def chosen_sites(cls, sites: Sites, config: Any) -> Sequence[LinearSite]:
        """The layers of a base that it acts at. Raises PrefixError where there is none."""
        raise NotImplementedError

    @classmethod
    def shapes(cls, site: LinearSite, config: Any) -> Shapes:
        """Of its tensors at a layer."""
        raise NotImplementedError

    @classmethod
    def initial(cls, part: str, shape: tuple[int, ...], config: Any) -> Tensor:
        """First values of a tensor; torch's global generator."""
        raise NotImplementedError

    def part(self, site: LinearSite, tensors: Mapping[str, Tensor]) -> LinearPart:
        """What these tensors do at the layer."""
        raise NotImplementedError

    @classmethod
    def build(cls, base: Base, config: Any) -> Self:
        chosen = cls.chosen_sites(find_sites(base.model), config)
        shapes = {(site.name, part): shape for site in chosen for part, shape in cls.shapes(site, config).items()}
        tensors = {f"{site}.{part}": cls.initial(part, shape, config) for (site, part), shape in shapes.items()}
        return cls(config, chosen, tensors)

    @classmethod
    def restore(cls, sites: Sites, config: Any, tensors: Mapping[str, Tensor]) -> Self:
        chosen = cls.chosen_sites(sites, config)
        shapes = {f"{s.name}.{part}": shape for s in chosen for part, shape in cls.shapes(s, config).items()}
        return cls(config, chosen, checked(tensors, shapes)).requires_grad_(False).eval()

    def linear_parts(self) -> dict[str, LinearPart]:
        return {site.name: self.part(site, self._tensors.at(site.name)) for site in self._sites}

    def kept_tensors(self) -> dict[str, Tensor]:
        return self._tensors.kept()
