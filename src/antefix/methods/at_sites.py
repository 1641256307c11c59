"""What methods share that are a few tensors at every site and a branch made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

from torch import Tensor

from antefix.attention.branch import Branch
from antefix.base import Base
from antefix.methods.base import MethodConfig, MethodModule
from antefix.parts.site_tensors import Shapes, SiteTensors, checked
from antefix.sites import KINDS, Kind, Site, Sites, find_sites, sites_of_kinds


class AtSitesConfig(MethodConfig):
    """Where a method acts."""

    sites: tuple[Kind, ...] = KINDS
    """Where it acts, of what the base has: `self`, `encoder_self`, `cross`."""


class AtSites(MethodModule):
    """A method gives the shapes of its tensors at a site, their first values, and the branch that they make."""

    def __init__(self, config: Any, sites: Sequence[Site], tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.config = config
        self._sites = list(sites)
        self._tensors = SiteTensors(tensors)

    @classmethod
    def shapes(cls, site: Site, config: Any) -> Shapes:
        """Of its tensors at a site."""
        raise NotImplementedError

    @classmethod
    def initial(cls, part: str, shape: tuple[int, ...], config: Any) -> Tensor:
        """First values of a tensor; torch's global generator."""
        raise NotImplementedError

    def branch(self, site: Site, tensors: Mapping[str, Tensor]) -> Branch:
        """What these tensors do at the site."""
        raise NotImplementedError

    @classmethod
    def chosen_sites(cls, sites: Sites, config: Any) -> Sequence[Site]:
        """The sites of a base that it acts at. Raises PrefixError where there is none."""
        return sites_of_kinds(sites, config.sites)

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

    def branches(self) -> dict[str, Sequence[Branch]]:
        return {site.name: (self.branch(site, self._tensors.at(site.name)),) for site in self._sites}

    def kept_tensors(self) -> dict[str, Tensor]:
        return self._tensors.kept()
