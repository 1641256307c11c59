"""Key/value slots: the learned keys and values that a prefix adds at attention sites.

Two parametrisations of the same thing. `DirectSlots` learns them as they are, or as multiples of the size that they
start with. `NetworkSlots` learns an embedding and a small network that produces them (Li & Liang 2021, section 4.3) and
is folded when kept.

Axes: P slots, G key/value heads, D key width, E value width.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from antefix.sites import Kind, Site

_FIT_STEPS, _FIT_RATE = 500, 1e-4
"""Of Adam, on the mean squared error, as in the paper's code."""


class KeyValue(NamedTuple):
    """The slots of one site."""

    key_GPD: Tensor
    value_GPE: Tensor


Slots = Mapping[str, KeyValue]
"""Site name -> slots."""


class DirectSlots(nn.Module):
    """Keys and values that are parameters themselves, or multiples of them.

    keys_only: sites whose values come from elsewhere, and are zeros here.

    relative: a parameter is a tensor divided by its own size at the start (the root mean square, as a power of two:
    nothing is rounded). Keys and values of one base differ in size by up to fifty times, and Adam moves every parameter
    by the learning rate, whatever its size: so one learning rate fits all of them, and other bases as well.
    """

    def __init__(
        self,
        sites: Iterable[Site],
        initial: Slots,
        *,
        relative: bool = False,
        keys_only: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.names = [site.name for site in sites]
        """Of the sites that have slots."""
        tensors = [[initial[n][part] for n in self.names if part == 0 or n not in keys_only] for part in (0, 1)]
        self._without_values = {n: torch.zeros_like(initial[n].value_GPE) for n in self.names if n in keys_only}
        self.scales = [[_size(t) if relative else 1.0 for t in of_part] for of_part in tensors]
        self.keys, self.values = (
            nn.ParameterList(t / scale for t, scale in zip(of_part, scales, strict=True))
            for of_part, scales in zip(tensors, self.scales, strict=True)
        )

    @property
    def num_slots(self) -> int:
        """Of the site that has most."""
        return max((key.shape[1] for key in self.keys), default=0)

    def forward(self) -> dict[str, KeyValue]:
        keys, values = (
            [p if scale == 1.0 else p * scale for p, scale in zip(parameters, scales, strict=True)]
            for parameters, scales in zip((self.keys, self.values), self.scales, strict=True)
        )
        rest = iter(values)
        every = [self._without_values[n] if n in self._without_values else next(rest) for n in self.names]
        return {n: KeyValue(k, v) for n, k, v in zip(self.names, keys, every, strict=True)}


def _size(tensor: Tensor) -> float:
    """The power of two next to the root mean square; 1 for zeros."""
    mean_square = float(tensor.detach().double().square().mean())
    return 2.0 ** round(math.log2(mean_square) / 2) if mean_square > 0 else 1.0


class NetworkSlots(nn.Module):
    """Embedding - linear - tanh - linear, one such network for each kind of site.

    The embedding is P x `embedding_width`, the hidden layer `hidden_width` wide; without a hidden layer one
    linear map makes everything (the form the paper writes down, while its code has the hidden layer). The
    last axis of the output is ordered layer 0 key, layer 0 value, layer 1 key, ..., heads inside, as in
    the paper's code. All modules start as torch makes them, as there.
    """

    def __init__(
        self, sites: Iterable[Site], num_virtual_tokens: int, embedding_width: int, hidden_width: int | None
    ) -> None:
        super().__init__()
        self._sites = list(sites)
        self.names = [site.name for site in self._sites]
        self.num_slots = num_virtual_tokens
        kinds: list[Kind] = list(dict.fromkeys(site.kind for site in self._sites))
        self.embeddings = nn.ModuleDict({k: nn.Embedding(num_virtual_tokens, embedding_width) for k in kinds})
        self.networks = nn.ModuleDict({k: _network(embedding_width, hidden_width, sum(self._widths(k))) for k in kinds})

    def forward(self) -> dict[str, KeyValue]:
        slots: dict[str, KeyValue] = {}
        for kind, network in self.networks.items():
            embedding = self.embeddings[kind]
            assert isinstance(embedding, nn.Embedding)
            parts = network(embedding.weight).split(self._widths(kind), dim=1)
            for index, site in enumerate(s for s in self._sites if s.kind == kind):
                key, value = (self._split_heads(parts[2 * index + s], site) for s in (0, 1))
                slots[site.name] = KeyValue(key, value)
        return slots

    def fit(self, target: Slots) -> None:
        """The paper's word initialisation: fit the network (not the embedding) to given slots."""
        optimiser = torch.optim.Adam(self.networks.parameters(), lr=_FIT_RATE)
        wanted = _flat(target.values())
        for _ in range(_FIT_STEPS):
            optimiser.zero_grad()
            error = torch.nn.functional.mse_loss(_flat(self().values()), wanted)
            error.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        self.zero_grad()  # the embedding's too: a left-over gradient would enter the first step of training

    def _widths(self, kind: str) -> list[int]:
        sites = [s for s in self._sites if s.kind == kind]
        return [w * s.num_key_value_heads for s in sites for w in (s.key_width, s.value_width)]

    def _split_heads(self, flat: Tensor, site: Site) -> Tensor:
        return flat.view(self.num_slots, site.num_key_value_heads, -1).transpose(0, 1)


def _network(embedding_width: int, hidden_width: int | None, out_width: int) -> nn.Module:
    if hidden_width is None:
        return nn.Linear(embedding_width, out_width)
    return nn.Sequential(nn.Linear(embedding_width, hidden_width), nn.Tanh(), nn.Linear(hidden_width, out_width))


def _flat(slots: Iterable[KeyValue]) -> Tensor:
    return torch.cat([t.reshape(-1) for pair in slots for t in pair])
