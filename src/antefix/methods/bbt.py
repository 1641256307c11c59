"""Black-box tuning (BBT; Sun et al. 2022, arXiv 2201.03514): a soft prompt found without gradients, in few dimensions.

    p = A z + p_0,  z of d' values, A of shape (P C, d') fixed and random

z alone is searched, by CMA-ES, from zero. p_0 are embeddings of tokens of the vocabulary; A is normal with a standard
deviation of

    alpha std(E) / (sqrt(d') sigma),  E the word embeddings, sigma the search's first step size

so that the values of A z have about alpha times the spread of embeddings. In a causal base the prompt stands before the
text and is kept as the keys and values that it comes to; A is made anew from the seed and kept nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from antefix.base import Base
from antefix.methods.base import MethodConfig
from antefix.methods.prompt_tuning import first_rows
from antefix.methods.soft_rows import ROWS, SoftRows
from antefix.parts.site_tensors import as_kept
from antefix.sites import Sites

_POINT = "point"


class BbtConfig(MethodConfig):
    """The choices of black-box tuning."""

    num_virtual_tokens: int = Field(50, ge=1)
    """Rows of the prompt; 50 in the paper."""
    dimensions: int = Field(500, ge=1)
    """Of what is searched: d'; 500 in the paper."""
    alpha: float = Field(1.0, gt=0)
    """The spread of the projected prompt, as a multiple of the embeddings'."""
    step_size: float = Field(1.0, gt=0)
    """Of the search at its beginning: sigma."""
    initial: Literal["vocabulary", "text"] = "vocabulary"
    """What p_0 is made of: tokens drawn from the first 5,000 of the vocabulary, or the words of `initial_text`."""
    initial_text: str = "Describe the following facts in a natural sentence:"
    """The words, with `initial = "text"`."""
    seed: int = 0
    """Of the projection, and of the tokens that are drawn."""


class Bbt(SoftRows):
    """One searched prompt."""

    Config = BbtConfig
    summary = "a soft prompt found without gradients (black-box tuning, Sun et al. 2022)"
    paper = "arXiv 2201.03514"
    parts = ("projected soft tokens",)
    is_searched = True
    first_rows: Tensor
    projection: Tensor | None

    @classmethod
    def default_learning_rate(cls, config: Any) -> float:
        """1: a search has a step size in the place of a learning rate."""
        return 1.0

    @classmethod
    def first_tensors(cls, base: Base, config: Any) -> dict[str, Tensor]:
        return {_POINT: torch.zeros(config.dimensions)}

    def __init__(self, config: Any, sites: Sites, tensors: Mapping[str, Tensor], model: PreTrainedModel | None) -> None:
        super().__init__(config, sites, tensors, model)
        self.register_buffer("first_rows", None, persistent=False)
        self.register_buffer("projection", None, persistent=False)

    @classmethod
    def build(cls, base: Base, config: Any) -> Self:
        module = super().build(base, config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            module._draw(base)
        return module

    def _draw(self, base: Base) -> None:
        """The fixed rows and the projection."""
        self.first_rows = first_rows(base, self.config.num_virtual_tokens, self.config)
        self.projection = projection(self.first_rows.numel(), embedding_spread(base), self.config)

    @classmethod
    def encoder_shapes(cls, sites: Sites, config: Any) -> dict[str, tuple[int, ...]]:
        return {ROWS: (config.num_virtual_tokens, sites.of_kinds(("encoder_self",))[0].hidden_width)}

    def searched(self) -> list[nn.Parameter]:
        return list(self._tensors.parameters())

    @property
    def step_size(self) -> float:
        return float(self.config.step_size)

    def kept_tensors(self) -> dict[str, Tensor]:
        return super().kept_tensors() if self._sites.is_causal else {ROWS: as_kept(self._rows())}

    def _rows(self) -> Tensor:
        if self.projection is None:  # a kept one
            return super()._rows()
        return self.first_rows + (self.projection @ self._tensors.named(_POINT)).view(self.first_rows.shape)


def embedding_spread(base: Base) -> float:
    """The standard deviation of word embeddings as the first layer gets them: Gemma 3 scales what its table holds."""
    embeddings = base.model.get_input_embeddings()
    weights: Tensor = embeddings.weight  # type: ignore[assignment]
    return float(weights.float().std()) * float(getattr(embeddings, "embed_scale", 1.0))


def projection(size: int, spread: float, config: Any) -> Tensor:
    """(size, d'), normal."""
    scale = config.alpha * spread / (math.sqrt(config.dimensions) * config.step_size)
    drawn: Tensor = torch.randn(size, config.dimensions) * scale
    return drawn
