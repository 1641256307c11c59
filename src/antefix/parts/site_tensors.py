"""Learned tensors at sites, by the names that a prefix file has for them: `layers.3.self.memory`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from antefix.errors import PrefixError

Shapes = Mapping[str, tuple[int, ...]]
"""Name -> shape."""


class SiteTensors(nn.Module):
    """Parameters by name."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = list(tensors)
        self.tensors = nn.ParameterList(t.clone() for t in tensors.values())

    def at(self, site: str) -> dict[str, Tensor]:
        """Those of one site, by what they are: `memory` and the like."""
        beginning = f"{site}."
        found = zip(self._names, self.tensors, strict=True)
        return {name.removeprefix(beginning): t for name, t in found if name.startswith(beginning)}

    def named(self, name: str) -> Tensor:
        """The one of this name."""
        found: Tensor = self.tensors[self._names.index(name)]
        return found

    def kept(self) -> dict[str, Tensor]:
        """As a file holds them: float32, on the processor."""
        return {n: as_kept(t) for n, t in zip(self._names, self.tensors, strict=True)}


def as_kept(tensor: Tensor) -> Tensor:
    """A tensor as a file holds it."""
    return tensor.detach().float().cpu().contiguous().clone()


def checked(tensors: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
    """The tensors of these names in float32. Raises PrefixError for one missing, one too many, or another shape."""
    if unknown := [name for name in tensors if name not in shapes]:
        raise PrefixError(f"tensor '{unknown[0]}' belongs to no site of this base: load the base it was trained on")
    for name, shape in shapes.items():
        if name not in tensors:
            raise PrefixError(f"the prefix has no tensor '{name}' for this base: load the base it was trained on")
        if tuple(tensors[name].shape) != tuple(shape):
            raise PrefixError(
                f"tensor '{name}' has shape {tuple(tensors[name].shape)}, this base asks for {tuple(shape)}: load the "
                "base it was trained on"
            )
    return {name: tensors[name].to(torch.float32) for name in shapes}
