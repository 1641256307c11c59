"""Infix-tuning as released (Li & Liang 2021, arXiv 2101.00190, section 7.3): soft tokens between source and target.

    [x; INFIX; y]

P soft tokens follow the source, see it, and take positions; the last of them predicts the target's first token. They
are learned embeddings, and a learned offset is added to their keys and values at every layer, where these are projected
(before rotary positions: the paper's base has none). The offsets start at zero. The paper makes them by a network; here
they are learned directly.

`infix` is the other form, with keys and values that are learned whole and see nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from pydantic import Field
from torch import Tensor

from antefix.base import Base
from antefix.errors import PrefixError
from antefix.methods.base import MethodModule
from antefix.methods.prompt_tuning import PromptTuningConfig, first_rows
from antefix.parts.inserted import Inserted
from antefix.parts.site_tensors import SiteTensors, checked
from antefix.sites import LinearSite, Sites, find_sites

_ROWS = "rows"


class SoftInfixConfig(PromptTuningConfig):
    """The choices of infix-tuning with soft tokens."""

    num_virtual_tokens: int = Field(10, ge=1)
    """Soft tokens between source and target; 1, 10 and 20 in the paper."""


class SoftInfix(MethodModule):
    """One infix of soft tokens."""

    Config = SoftInfixConfig
    summary = "soft tokens between source and target, their keys and values moved (infix of Li & Liang 2021)"
    paper = "arXiv 2101.00190"
    parts = ("soft tokens", "offsets")

    def __init__(self, sites: Sites, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._sites = [s for s in sites.layers.linear if s.key or s.value]
        self._tensors = SiteTensors(tensors)

    @classmethod
    def default_learning_rate(cls, config: Any) -> float:
        """1e-2, as for prompt tuning: decided here."""
        return 1e-2

    @classmethod
    def build(cls, base: Base, config: Any) -> Self:
        sites = find_sites(base.model)
        shapes = _shapes(sites, config)
        offsets = {name: torch.zeros(shape) for name, shape in shapes.items() if name != _ROWS}
        return cls(sites, {_ROWS: first_rows(base, config.num_virtual_tokens, config), **offsets})

    @classmethod
    def restore(cls, sites: Sites, config: Any, tensors: Mapping[str, Tensor]) -> Self:
        return cls(sites, checked(tensors, _shapes(sites, config))).requires_grad_(False).eval()

    @property
    def needs_places(self) -> bool:
        return True

    @property
    def num_inserted_tokens(self) -> int:
        return len(self._tensors.named(_ROWS))

    def inserted(self) -> Inserted:
        return Inserted(self._tensors.named(_ROWS), {s.name: self._offset(s) for s in self._sites})

    def kept_tensors(self) -> dict[str, Tensor]:
        return self._tensors.kept()

    def _offset(self, site: LinearSite) -> Tensor:
        """(P, O): zero where a fused layer gives queries."""
        offset = self._tensors.named(_ROWS).new_zeros(self.num_inserted_tokens, site.width_out)
        for part, tensor in self._tensors.at(site.name).items():
            columns = torch.tensor(getattr(site, part), device=offset.device)
            offset = offset.index_copy(1, columns, tensor)
        return offset


def _shapes(sites: Sites, config: SoftInfixConfig) -> dict[str, tuple[int, ...]]:
    """Raises PrefixError for a base that is not causal: elsewhere there is nothing between source and target."""
    if not sites.is_causal:
        raise PrefixError("tokens between source and target need a causal base: use prefix_tuning, or infix")
    shapes: dict[str, tuple[int, ...]] = {_ROWS: (config.num_virtual_tokens, sites.hidden_size)}
    for site in sites.layers.linear:
        for part in ("key", "value"):
            if columns := getattr(site, part):
                shapes[f"{site.name}.{part}"] = (config.num_virtual_tokens, len(columns))
    return shapes
