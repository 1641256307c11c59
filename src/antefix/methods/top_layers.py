"""The topmost blocks alone: the baseline of Li & Liang 2021 (arXiv 2101.00190, section 5: FT-top2).

With them what stands after the last block is trained (GPT-2: its last layer norm). Their released code trains the tied
embeddings too, the table of Hu et al. 2022 (arXiv 2106.09685) counts them not: here they are an option.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from antefix.errors import PrefixError
from antefix.methods.base import MethodConfig
from antefix.methods.full import Full
from antefix.sites import Sites


class TopLayersConfig(MethodConfig):
    """The choices of training the topmost blocks."""

    num_layers: int = Field(2, ge=1)
    """How many blocks are trained, of a decoder where there is one."""
    embeddings: bool = False
    """Whether what is in no block (embeddings, output head) is trained too."""


class TopLayers(Full):
    """The weights of some blocks."""

    Config = TopLayersConfig
    summary = "the topmost blocks alone (FT-top2, Li & Liang 2021)"
    paper = "arXiv 2101.00190"

    @classmethod
    def chosen(cls, sites: Sites, config: Any) -> Sequence[str]:
        """Raises PrefixError where there are not so many blocks."""
        layers = sites.layers
        if config.num_layers > len(layers.blocks):
            raise PrefixError(f"num_layers = {config.num_layers}: the base has {len(layers.blocks)} blocks")
        inside = [*layers.blocks[-config.num_layers :], *layers.after_blocks]
        in_blocks = {name for name in layers.weights for block in layers.blocks if name.startswith(f"{block}.")}
        return [
            name
            for name in layers.weights
            if any(name.startswith(f"{path}.") for path in inside) or (config.embeddings and name not in in_blocks)
        ]
