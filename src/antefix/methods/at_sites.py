"""What methods share that are a few tensors at every site of attention and a branch made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from antefix.attention.branch import Branch
from antefix.methods.at_places import AtPlaces
from antefix.methods.base import MethodConfig
from antefix.sites import KINDS, Kind, Site, Sites, sites_of_kinds


class AtSitesConfig(MethodConfig):
    """Where a method acts."""

    sites: tuple[Kind, ...] = KINDS
    """Where it acts, of what the base has: `self`, `encoder_self`, `cross`."""


class AtSites(AtPlaces[Site]):
    """A method gives the branch that its tensors make at a site."""

    def branch(self, site: Site, tensors: Mapping[str, Tensor]) -> Branch:
        """What these tensors do at the site."""
        raise NotImplementedError

    @classmethod
    def chosen_sites(cls, sites: Sites, config: Any) -> Sequence[Site]:
        """Raises PrefixError where the base has none of the kinds."""
        return sites_of_kinds(sites, config.sites)

    def branches(self) -> dict[str, Sequence[Branch]]:
        return {site.name: (self.branch(site, self._tensors.at(site.name)),) for site in self._places}
