"""Prefix-propagation (Li et al. 2023, arXiv 2305.12086): rows before the text that are added to at every layer.

P positions stand before the text, with zeros for word embeddings; at the input of every layer l their hidden states
h get P_l added, then make queries, keys and values like tokens and flow on:

    h[:P] <- h[:P] + P_l

layers * P * C parameters: half of prefix-tuning's where all heads have keys of their own. In a causal base the rows
see nothing of the text: their keys and values are computed once a step and are what is kept. In an encoder they are
rows of the batch. P_l of zero leaves P more positions that are real: it is not the bare base.

Not built: the released options to multiply by a learned row first, and to be half prefix-tuning.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from antefix.base import Base
from antefix.methods.base import MethodConfig
from antefix.methods.soft_rows import SoftRows
from antefix.sites import Sites, find_sites


class PrefixPropagationConfig(MethodConfig):
    """The choices of prefix-propagation."""

    num_virtual_tokens: int = Field(8, ge=1)
    """Positions before the text; 8 in the released scripts."""
    initial_scale: float = Field(0.02, ge=0)
    """Standard deviation of the first values."""


class PrefixPropagation(SoftRows):
    """One propagated prefix."""

    Config = PrefixPropagationConfig
    summary = "positions before the text whose states are added to at every layer (Li et al. 2023)"
    paper = "arXiv 2305.12086"
    parts = ("added rows",)

    @classmethod
    def default_learning_rate(cls, config: Any) -> float:
        """5e-3, the middle of the released grid (5e-4 to 5e-2)."""
        return 5e-3

    @classmethod
    def first_tensors(cls, base: Base, config: Any) -> dict[str, Tensor]:
        shapes = cls._shapes(find_sites(base.model), config)
        return {name: torch.randn(shape) * config.initial_scale for name, shape in shapes.items()}

    @classmethod
    def encoder_shapes(cls, sites: Sites, config: Any) -> dict[str, tuple[int, ...]]:
        return cls._shapes(sites, config)

    @classmethod
    def _shapes(cls, sites: Sites, config: Any) -> dict[str, tuple[int, ...]]:
        chosen = sites.of_kinds(("self",) if sites.is_causal else ("encoder_self",))
        return {f"{s.name}.added": (config.num_virtual_tokens, s.hidden_width) for s in chosen}

    def _rows(self) -> Tensor:
        some = next(iter(self._added().values()))
        return torch.zeros_like(some)
