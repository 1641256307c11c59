"""What is learned at a linear layer: scales, a bias, narrow networks beside it or after it.

A layer y = W x becomes

    y = s_out * W (s_in * x) + b + sum of the networks that read x or what another layer was given
    y <- y + sum of the networks that read y

with a network U g(D x + d) + u. Low-rank matrices (Hu et al. 2022, arXiv 2106.09685) are networks without g, d and u.

Axes: I width that a layer takes, O width that it gives, R width of a network, U prefixes, N of them in use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Activation = Literal["identity", "relu", "gelu"]
Reads = Literal["input", "output", "feed_forward_input"]
"""What a network reads: what the layer takes, what it gives, or what its block's feed-forward layers take."""
ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": torch.nn.functional.relu,
    "gelu": torch.nn.functional.gelu,
}


class Network(NamedTuple):
    """U g(D x + d) + u; what multiplies it stands in U and u."""

    down_RI: Tensor
    up_OR: Tensor
    down_bias_R: Tensor | None = None
    up_bias_O: Tensor | None = None

    @classmethod
    def square(cls, weight_OO: Tensor, bias_O: Tensor) -> Network:
        """A whole matrix, W x + b: after an identity, so that it stands beside narrow ones in a batch."""
        return cls(torch.eye(len(weight_OO)).to(weight_OO), weight_OO, None, bias_O)

    def __call__(self, x: Tensor, activation: Activation) -> Tensor:
        """(..., I) -> (..., O), in the network's own precision."""
        hidden = torch.nn.functional.linear(x.to(self.down_RI.dtype), self.down_RI, self.down_bias_R)
        return torch.nn.functional.linear(ACTIVATIONS[activation](hidden), self.up_OR, self.up_bias_O)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearPart:
    """What one prefix has learned at one linear layer; None: nothing of the kind."""

    input_scale_I: Tensor | None = None
    output_scale_O: Tensor | None = None
    bias_O: Tensor | None = None
    networks: tuple[tuple[Reads, Activation, Network], ...] = ()

    def tensors(self) -> list[Tensor]:
        """All that it is made of."""
        vectors = [self.input_scale_I, self.output_scale_O, self.bias_O]
        of_networks = [t for _, _, network in self.networks for t in network]
        return [t for t in (*vectors, *of_networks) if t is not None]


def together(parts: Sequence[LinearPart]) -> LinearPart:
    """Several at one layer as one: scales are multiplied, everything else is added."""
    found: dict[str, Tensor | None] = {}
    for field in fields(LinearPart):
        if field.name == "networks":
            continue
        given = [t for part in parts if (t := getattr(part, field.name)) is not None]
        joined = torch.sum if field.name == "bias_O" else torch.prod
        found[field.name] = given[0] if len(given) == 1 else joined(torch.stack(given), dim=0) if given else None
    return LinearPart(**found, networks=tuple(network for part in parts for network in part.networks))
