"""BBTv2 (Sun et al. 2022, arXiv 2205.11200): black-box tuning with a prompt for every layer, one after the other.

    h_j[prompt] <- h_j[prompt] + A_j z_j  at the input of every layer j

The positions hold embeddings of tokens and flow on; they are not replaced. Every A_j is normal, scaled as in `bbt` by
the spread of what its layer is given: of the word embeddings for the first, of the prompt's own states for the others,
cut off five times at three standard deviations around the mean. The paper measures these on the texts of the first
forward pass; here the prompt's own tokens are read, since a method is built without data. The z_j are searched from the
lowest layer to the highest, again and again, each with the others at their best.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from antefix.base import Base
from antefix.methods.bbt import Bbt, BbtConfig, embedding_spread, projection
from antefix.methods.prompt_tuning import first_tokens
from antefix.methods.soft_rows import ROWS
from antefix.parts.site_tensors import as_kept
from antefix.sites import Site, Sites, find_sites, first_states, layer_inputs

_CUTS, _WIDTH = 5, 3.0


class BbtV2Config(BbtConfig):
    """The choices of BBTv2."""

    alpha: float = Field(0.2, gt=0)
    """The spread of what is added at a layer, as a multiple of its states'."""
    step_size: float = Field(0.2, gt=0)
    """Of every layer's search at its beginning: sigma."""


class BbtV2(Bbt):
    """One searched prompt a layer."""

    Config = BbtV2Config
    summary = "prompts of every layer found without gradients, one after the other (BBTv2, Sun et al. 2022)"
    paper = "arXiv 2205.11200"
    parts = ("projected added rows",)

    def __init__(self, config: Any, sites: Sites, tensors: Mapping[str, Tensor], model: PreTrainedModel | None) -> None:
        super().__init__(config, sites, tensors, model)
        self._chosen = _chosen(sites)
        for number in range(len(self._chosen)):
            self.register_buffer(f"projection_{number}", None, persistent=False)

    @classmethod
    def first_tensors(cls, base: Base, config: Any) -> dict[str, Tensor]:
        return {f"{site.name}.point": torch.zeros(config.dimensions) for site in _chosen(find_sites(base.model))}

    @classmethod
    def encoder_shapes(cls, sites: Sites, config: Any) -> dict[str, tuple[int, ...]]:
        added = {f"{s.name}.added": (config.num_virtual_tokens, s.hidden_width) for s in _chosen(sites)}
        return {**super().encoder_shapes(sites, config), **added}

    def _draw(self, base: Base) -> None:
        ids = first_tokens(base, self.config.num_virtual_tokens, self.config).to(base.model.device)
        states: Tensor = first_states(base.model, ids)
        self.first_rows = states[0].float().cpu()
        inputs = layer_inputs(base.model, ids)
        for number, site in enumerate(self._chosen):
            spread = embedding_spread(base) if number == 0 else _spread(inputs[site.name].float().flatten())
            size = self.config.num_virtual_tokens * site.hidden_width
            self.register_buffer(f"projection_{number}", projection(size, spread, self.config), persistent=False)

    def kept_tensors(self) -> dict[str, Tensor]:
        if self._sites.is_causal:
            return super().kept_tensors()
        added = {f"{name}.added": as_kept(tensor) for name, tensor in self._added().items()}
        return {ROWS: as_kept(self._rows()), **added}

    def _rows(self) -> Tensor:
        return self.first_rows if self._is_drawn else self._tensors.named(ROWS)

    def _added(self) -> dict[str, Tensor]:
        if not self._is_drawn:
            return super()._added()
        rows = self.config.num_virtual_tokens
        return {
            site.name: (self.get_buffer(f"projection_{n}") @ self._tensors.at(site.name)["point"]).view(rows, -1)
            for n, site in enumerate(self._chosen)
        }

    @property
    def _is_drawn(self) -> bool:
        return self._buffers["first_rows"] is not None


def _chosen(sites: Sites) -> tuple[Site, ...]:
    return sites.of_kinds(("self",) if sites.is_causal else ("encoder_self",))


def _spread(values: Tensor) -> float:
    """The standard deviation of values that are cut off at three of it, five times."""
    for _ in range(_CUTS):
        mean, deviation = values.mean(), values.std()
        values = values.clamp(mean - _WIDTH * deviation, mean + _WIDTH * deviation)
    return float(values.std())
