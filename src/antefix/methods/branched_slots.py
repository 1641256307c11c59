"""What methods share whose slots take part in the softmax in another way than prefix-tuning's.

Axes: P slots, G key/value heads, D key width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

from torch import Tensor

from antefix.attention.branch import Branch
from antefix.attention.slot_share import SlotBranch
from antefix.base import Base
from antefix.methods.prefix_tuning import PrefixTuning
from antefix.parts.key_value import KeyValue
from antefix.parts.site_tensors import Shapes, SiteTensors, checked
from antefix.sites import Site, Sites, find_sites

_SLOT_PARTS = ("key", "value")


class BranchedSlots(PrefixTuning):
    """Prefix-tuning with a branch at every site, or at some; a method may add tensors of its own there."""

    folds_to_key_value = False

    @classmethod
    def shapes(cls, site: Site, config: Any, num_slots: int) -> Shapes:
        """Of its own tensors at a site."""
        return {}

    @classmethod
    def initial_of(cls, part: str, shape: tuple[int, ...], config: Any) -> Tensor:
        """First values of a tensor of its own."""
        raise NotImplementedError

    def is_branched(self, site: Site) -> bool:
        """Whether slots at the site do what `branch` says; else they do what prefix-tuning's do."""
        return True

    def branch(self, site: Site, slots: KeyValue, own: Mapping[str, Tensor]) -> SlotBranch:
        """What these slots do at a branched site."""
        raise NotImplementedError

    @classmethod
    def build(cls, base: Base, config: Any) -> Self:
        module: Self = super().build(base, config)
        shapes = module._own_shapes(find_sites(base.model))
        own = {n: cls.initial_of(n.rpartition(".")[2], shape, config) for n, shape in shapes.items()}
        return module._with_own(find_sites(base.model), own)

    @classmethod
    def restore(cls, sites: Sites, config: Any, tensors: Mapping[str, Tensor]) -> Self:
        of_slots = {n: t for n, t in tensors.items() if n.rpartition(".")[2] in _SLOT_PARTS}
        module: Self = super().restore(sites, config, of_slots)
        own = checked({n: t for n, t in tensors.items() if n not in of_slots}, module._own_shapes(sites))
        return module._with_own(sites, own).requires_grad_(False).eval()

    def slots(self) -> dict[str, KeyValue]:
        return self._of_sites(branched=False)

    def branches(self) -> dict[str, Sequence[Branch]]:
        return {
            name: (self.branch(self._known_sites[name], pair, self._own.at(name)),)
            for name, pair in self._of_sites(branched=True).items()
        }

    def kept_tensors(self) -> dict[str, Tensor]:
        return super().kept_tensors() | self._own.kept()

    def _of_sites(self, *, branched: bool) -> dict[str, KeyValue]:
        """The slots of branched sites, or of the others. A network runs, and draws, only where there are some."""
        names = [n for n in self._slots.names if self.is_branched(self._known_sites[n]) == branched]
        learned = self.learned_slots() if names else {}
        return {name: learned[name] for name in names}

    def _own_shapes(self, sites: Sites) -> Shapes:
        counts = {name: pair.key_GPD.shape[1] for name, pair in self.learned_slots().items()}
        return {
            f"{site.name}.{part}": shape
            for site in sites.attention
            if site.name in counts
            for part, shape in self.shapes(site, self.config, counts[site.name]).items()
        }

    def _with_own(self, sites: Sites, own: Mapping[str, Tensor]) -> Self:
        self._known_sites = {site.name: site for site in sites.attention}
        self._keys_only = self.keys_only(sites)
        self._own = SiteTensors(own)
        return self
