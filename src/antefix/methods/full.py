"""Full fine-tuning: every weight of the base is trained. The baseline that prefixes are compared with.

What is kept is every weight; rows of a batch cannot differ in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from antefix.base import Base
from antefix.methods.base import MethodConfig, MethodModule
from antefix.parts.site_tensors import checked
from antefix.parts.weights import Weights
from antefix.sites import Sites, find_sites


class FullConfig(MethodConfig):
    """There is nothing to choose."""


class Full(MethodModule):
    """A weight for every weight. Subclasses choose some."""

    Config: ClassVar[type[MethodConfig]] = FullConfig
    summary = "every weight of the base (full fine-tuning)"
    paper = "none"
    parts = ("weights",)
    acts_on_rows = False

    def __init__(self, trained: Weights) -> None:
        super().__init__()
        self._trained = trained

    @classmethod
    def default_learning_rate(cls, config: Any) -> float:
        """2e-4: the best of three for 1,000 E2E pairs (`results/beside_peft/`)."""
        return 2e-4

    @classmethod
    def chosen(cls, sites: Sites, config: Any) -> Sequence[str]:
        """Which weights are trained, by their path."""
        return list(sites.layers.weights)

    @classmethod
    def build(cls, base: Base, config: Any) -> Self:
        return cls(Weights.of(base.model, cls.chosen(find_sites(base.model), config)))

    @classmethod
    def restore(cls, sites: Sites, config: Any, tensors: Mapping[str, Tensor]) -> Self:
        every = sites.layers.weights
        shapes = {name: every[name] for name in cls.chosen(sites, config)}
        return cls(Weights(checked(tensors, shapes))).requires_grad_(False).eval()

    def weights(self) -> dict[str, nn.Parameter]:
        return self._trained.named()

    def kept_tensors(self) -> dict[str, Tensor]:
        return self._trained.kept()
