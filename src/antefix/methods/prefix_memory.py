"""PrefixMemory-Tuning (Prefix-Tuning+; arXiv 2506.13674): the prefix outside the softmax.

    o_i = attention(q_i) + phi(q_i)^T M,  M of shape (D, E) for every head

with phi = elu or gelu. M starts at 0: the base exactly, and its gradient is alive, since phi(q) is not 0. The paper
leaves open whether heads that share keys share M, and how M starts; decided here: one M a query head, queries as
attention gets them (after rotary embedding).

Axes: B rows, T queries, H query heads, D key width, E value width, C width of hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import elu, gelu

from antefix.attention.branch import Addend, Branch, Call, Residual
from antefix.methods.at_sites import AtSites, AtSitesConfig
from antefix.parts.site_tensors import Shapes
from antefix.sites import Site

_FEATURES: dict[str, Callable[[Tensor], Tensor]] = {"elu": elu, "gelu": gelu}


class PrefixMemoryConfig(AtSitesConfig):
    """The choices of PrefixMemory-Tuning."""

    feature_map: Literal["elu", "gelu"] = "elu"
    """What is applied to queries before they meet the memory."""
    place: Literal["heads", "after_projection"] = "heads"
    """`heads`: of every head's query, before the output projection, as in the paper. `after_projection`: of the layer's
    input, added after it."""
    initial_scale: float = Field(0.0, ge=0)
    """Standard deviation of the first values; 0: the base exactly."""


class MemoryOfQueries(Branch):
    """(H, D, E) at one site."""

    def __init__(self, memory_HDE: Tensor, feature_map: str) -> None:
        self._memory_HDE, self._feature = memory_HDE, _FEATURES[feature_map]

    def __call__(self, call: Call) -> Addend:
        return Addend(self._feature(call.query_BHTD.to(self._memory_HDE.dtype)) @ self._memory_HDE)

    def tensors(self) -> Sequence[Tensor]:
        return (self._memory_HDE,)


class MemoryOfStates(Branch):
    """(C, C) at one site."""

    needs_hidden_states = True

    def __init__(self, memory_CC: Tensor, feature_map: str) -> None:
        self._memory_CC, self._feature = memory_CC, _FEATURES[feature_map]

    def __call__(self, call: Call) -> Residual:
        return Residual(self._feature(call.hidden().to(self._memory_CC.dtype)) @ self._memory_CC)

    def tensors(self) -> Sequence[Tensor]:
        return (self._memory_CC,)


class PrefixMemory(AtSites):
    """One memory."""

    Config = PrefixMemoryConfig
    summary = "a memory that queries read, outside the softmax (PrefixMemory-Tuning, 2025)"
    paper = "arXiv 2506.13674"
    parts = ("memory",)

    @classmethod
    def default_learning_rate(cls, config: Any) -> float:
        """1e-3: decided here, the paper's is not known."""
        return 1e-3

    @classmethod
    def shapes(cls, site: Site, config: Any) -> Shapes:
        if config.place == "heads":
            return {"memory": (site.num_heads, site.key_width, site.value_width)}
        return {"memory": (site.hidden_width, site.hidden_width)}

    @classmethod
    def initial(cls, part: str, shape: tuple[int, ...], config: Any) -> Tensor:
        scale: float = config.initial_scale
        return torch.randn(shape) * scale

    def branch(self, site: Site, tensors: Mapping[str, Tensor]) -> Branch:
        made = MemoryOfQueries if self.config.place == "heads" else MemoryOfStates
        return made(tensors["memory"], self.config.feature_map)
