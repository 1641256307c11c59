"""Trained weights in the place of the base's own."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from antefix.parts.weights import not_in_float32


class WeightsAtWork:
    """The weights of one attached prefix. The base's are put back as they were."""

    def __init__(self, model: nn.Module, weights: Mapping[str, nn.Parameter]) -> None:
        self._model, self._weights = model, weights
        self._own: list[tuple[nn.Module, str, nn.Parameter | None]] = []

    def install(self, modules: Mapping[str, nn.Module]) -> None:
        """Go to work."""
        every = dict(self._model.named_parameters())
        ours = {id(every[name]): _as_in(weight, every[name]) for name, weight in self._weights.items()}
        for module in modules.values():  # tied weights have several owners
            for name, weight in list(module._parameters.items()):
                if weight is not None and id(weight) in ours:
                    self._own.append((module, name, weight))
                    module._parameters[name] = ours[id(weight)]

    def uninstall(self, modules: Mapping[str, nn.Module]) -> None:
        """Put the base's weights back."""
        for module, name, weight in self._own:
            module._parameters[name] = weight
        self._own.clear()

    def forget(self) -> None:
        """Nothing is gathered here."""


def _as_in(weight: nn.Parameter, own: nn.Parameter) -> nn.Parameter:
    """In the base's precision. Raises PrefixError for one that is trained: it would learn nothing."""
    if weight.dtype == own.dtype:
        return weight
    if weight.requires_grad:
        raise not_in_float32(str(own.dtype)[6:])
    return nn.Parameter(weight.to(own.dtype), requires_grad=False)
