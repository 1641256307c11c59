"""A head that reads labels off hidden states: one linear map, trained and kept with a prefix.

Axes: N states, C width of hidden states, K labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from antefix.errors import PrefixError
from antefix.parts.site_tensors import as_kept


class LabelHead(nn.Module):
    """Scores of labels: x W^T + b. It starts at small random weights, as torch makes linear layers."""

    reads_logits: ClassVar[bool] = False
    """It is given last hidden states, not the base's logits."""
    NAMES = ("head.weight", "head.bias")
    """Its tensors in a file."""

    def __init__(self, width: int, num_labels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, num_labels)

    def forward(self, states_NC: Tensor) -> Tensor:
        """(N, K), in the head's own precision."""
        scores: Tensor = self.linear(states_NC.to(self.linear.weight.dtype))
        return scores

    def kept(self) -> dict[str, Tensor]:
        """As a file holds it: float32, on the processor."""
        tensors = (self.linear.weight, self.linear.bias)
        return {name: as_kept(tensor) for name, tensor in zip(self.NAMES, tensors, strict=True)}

    @classmethod
    def apart(cls, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The tensors of a head among those of a kept prefix, and all others."""
        head = {name: t for name, t in tensors.items() if name in cls.NAMES}
        return head, {name: t for name, t in tensors.items() if name not in head}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], num_labels: int) -> Self:
        """A kept head. Raises PrefixError for tensors that are missing or do not fit the labels."""
        weight, bias = (tensors.get(name) for name in cls.NAMES)
        if weight is None or bias is None or weight.ndim != 2 or weight.shape[0] != num_labels:
            raise PrefixError(f"the prefix has no head for its {num_labels} labels")
        if bias.shape != (num_labels,):
            raise PrefixError(f"tensor 'head.bias' has shape {tuple(bias.shape)}, there are {num_labels} labels")
        head = cls(weight.shape[1], num_labels)
        with torch.no_grad():
            head.linear.weight.copy_(weight)
            head.linear.bias.copy_(bias)
        return head.requires_grad_(False)
