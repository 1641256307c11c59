"""Prompt tuning (Lester et al. 2021, arXiv 2104.08691): learned rows in the place of the first embeddings.

    h_i = P[i, :] for i in the prompt, at the input embeddings; nothing else is learned

In a causal base the rows depend on nothing after them: their keys and values are computed once a step, not once a row,
and are what is kept. That equals soft tokens concatenated in front. In an encoder (that of an encoder-decoder too,
where cross-attention sees the rows as well) they see the text and are rows of the batch; where an encoder adds
positions to its embeddings, they enter after that, at the first layer, and the text's tokens stand where they stand
without them.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from antefix.base import Base
from antefix.errors import PrefixError
from antefix.methods.base import MethodConfig
from antefix.methods.soft_rows import ROWS, SoftRows
from antefix.sites import Sites, find_sites, first_states

_COMMON_TOKENS = 5000


class PromptTuningConfig(MethodConfig):
    """The choices of prompt tuning."""

    num_virtual_tokens: int = Field(20, ge=1)
    """Rows; 100 in the paper."""
    initial: Literal["text", "vocabulary", "uniform"] = "text"
    """First values: embeddings of real words; of tokens drawn from the first 5,000 of the vocabulary; or uniform."""
    initial_text: str = "Describe the following facts in a natural sentence:"
    """The words, with `initial = "text"`: best the task's own description."""
    initial_scale: float = Field(0.5, gt=0)
    """Half the width of `uniform`, around 0."""


class PromptTuning(SoftRows):
    """One soft prompt."""

    Config = PromptTuningConfig
    summary = "learned rows before the input embeddings (Lester et al. 2021)"
    paper = "arXiv 2104.08691"
    parts = ("soft tokens",)

    @classmethod
    def default_learning_rate(cls, config: Any) -> float:
        """1e-2 with AdamW: decided here. The paper's 0.3 is for Adafactor without scaling by parameters."""
        return 1e-2

    @classmethod
    def first_tensors(cls, base: Base, config: Any) -> dict[str, Tensor]:
        return {ROWS: first_rows(base, config.num_virtual_tokens, config)}

    @classmethod
    def encoder_shapes(cls, sites: Sites, config: Any) -> dict[str, tuple[int, ...]]:
        return {ROWS: (config.num_virtual_tokens, _row_width(sites))}


def first_rows(base: Base, count: int, config: Any) -> Tensor:
    """(P, C) as `initial` says. Raises PrefixError for a text of no tokens."""
    if config.initial == "uniform":
        sites = find_sites(base.model)
        width = sites.hidden_size if sites.is_causal else _row_width(sites)
        scale: float = config.initial_scale
        return (torch.rand(count, width) * 2 - 1) * scale
    states: Tensor = first_states(base.model, first_tokens(base, count, config).to(base.model.device))
    rows: Tensor = states[0].float().cpu()
    return rows


def first_tokens(base: Base, count: int, config: Any) -> Tensor:
    """(1, P): tokens drawn from the first of the vocabulary, or those of a text, repeated as often as it takes.

    Raises PrefixError for a text of no tokens.
    """
    if config.initial == "vocabulary":
        weights: Tensor = base.model.get_input_embeddings().weight  # type: ignore[assignment]
        return torch.randint(min(_COMMON_TOKENS, len(weights)), (1, count))
    ids = base.tokenizer(config.initial_text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise PrefixError("initial_text has no tokens: give a few words that say what the task is")
    return torch.tensor([(ids * (count // len(ids) + 1))[:count]])


def _row_width(sites: Sites) -> int:
    return sites.of_kinds(("encoder_self",))[0].hidden_width
