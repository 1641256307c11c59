"""What methods share that are a few tensors at every one of some places in a base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Generic, Protocol, Self, TypeVar

from torch import Tensor

from antefix.base import Base
from antefix.methods.base import MethodModule
from antefix.parts.site_tensors import Shapes, SiteTensors, checked
from antefix.sites import Sites, find_sites


class Place(Protocol):
    """A site of attention, a linear layer: something that a kept tensor is named after."""

    @property
    def name(self) -> str: ...


P = TypeVar("P", bound=Place)


class AtPlaces(MethodModule, Generic[P]):
    """A method chooses places, and gives the shapes of its tensors there and their first values."""

    def __init__(self, config: Any, places: Sequence[P], tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.config = config
        self._places = list(places)
        self._tensors = SiteTensors(tensors)

    @classmethod
    def chosen_sites(cls, sites: Sites, config: Any) -> Sequence[P]:
        """The places of a base that it acts at. Raises PrefixError where there is none."""
        raise NotImplementedError

    @classmethod
    def shapes(cls, site: P, config: Any) -> Shapes:
        """Of its tensors at a place."""
        raise NotImplementedError

    @classmethod
    def initial(cls, part: str, shape: tuple[int, ...], config: Any) -> Tensor:
        """First values of a tensor; torch's global generator."""
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

    def kept_tensors(self) -> dict[str, Tensor]:
        return self._tensors.kept()
