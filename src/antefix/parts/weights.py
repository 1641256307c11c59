"""Weights of the base's own that are trained: what the baselines keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from antefix.errors import PrefixError
from antefix.parts.site_tensors import as_kept
from antefix.quantised import is_quantised


def not_in_float32(loaded_in: str) -> PrefixError:
    """What is told where a base's weights are to be trained and it was loaded in a lower precision."""
    return PrefixError(
        f"the base's own weights are trained, in float32, and it was loaded in {loaded_in}: set dtype = 'float32'"
    )


class Weights(nn.Module):
    """Copies of a base's weights by their path, in float32."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = list(tensors)
        self.tensors = nn.ParameterList(nn.Parameter(t.detach().to(torch.float32).clone()) for t in tensors.values())

    @classmethod
    def of(cls, model: PreTrainedModel, names: Sequence[str]) -> Weights:
        """Raises PrefixError for a base that is not in float32: small steps would be rounded away."""
        if model.dtype != torch.float32 or is_quantised(model):
            raise not_in_float32("int8" if is_quantised(model) else str(model.dtype)[6:])
        every = dict(model.named_parameters())
        return cls({name: every[name] for name in names})

    def named(self) -> dict[str, nn.Parameter]:
        """The weights by their path."""
        return dict(zip(self._names, self.tensors, strict=True))

    def kept(self) -> dict[str, Tensor]:
        """As a file holds them."""
        return {name: as_kept(tensor) for name, tensor in self.named().items()}
