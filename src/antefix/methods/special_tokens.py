"""Embeddings of new tokens (Unfreeze with Care; Sun et al. 2022, arXiv 2203.02652): the symbols of an output language.

A base that was never taught a language of brackets and labels writes it poorly, whatever prefix it has. Here every
symbol is one new token with an embedding of its own, which is read and, tied, scored:

    e(t) = E_S[t] for a new token t,    logits = [W h; E_S h]

The old rows are not touched. An embedding starts at the mean of the embeddings of its symbol's words, plus a little
noise. The paper's code and numbers are not public; this form is decided here. It is meant for unions:
`prefix_tuning+special_tokens`, `bitfit+special_tokens`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from pydantic import Field, field_validator
from torch import Tensor

from antefix.base import Base
from antefix.errors import ConfigError, PrefixError
from antefix.methods.base import MethodConfig, MethodModule
from antefix.parts.site_tensors import SiteTensors, checked
from antefix.sites import Sites, find_sites

_ROWS = "embeddings"


class SpecialTokensConfig(MethodConfig):
    """The choices of new tokens."""

    tokens: tuple[str, ...] = ()
    """The symbols, each one token. Empty: what `pattern` finds in the training targets."""
    pattern: str = r"\[(?:IN|SL):[A-Z_]+|\]"
    """A regular expression for symbols; without a change those of TOP: opening brackets with their labels, and `]`."""
    initial_noise: float = Field(0.1, ge=0)
    """Standard deviation of the noise at the start, as a multiple of the embeddings'."""

    @field_validator("pattern")
    @classmethod
    def _is_a_regular_expression(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"no regular expression ({error})") from error
        return pattern

    def completed(self, targets: Sequence[str]) -> Self:
        """With the symbols that training targets hold. Raises ConfigError where there are none."""
        if self.tokens:
            return self
        found = sorted({m[0] for text in targets for m in re.finditer(self.pattern, text) if m[0]})
        if not found:
            raise ConfigError(
                f"config.pattern = '{self.pattern}' finds no symbol in the training targets: name config.tokens"
            )
        return self.model_copy(update={"tokens": tuple(found)})


class SpecialTokens(MethodModule):
    """An embedding for every new token."""

    Config = SpecialTokensConfig
    summary = "embeddings of new tokens, read and scored (semantic parsing of Sun et al. 2022)"
    paper = "arXiv 2203.02652"
    needs = ("new tokens (config.tokens), or targets in which they are found",)
    parts = ("embeddings",)

    def __init__(self, config: SpecialTokensConfig, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._symbols = config.tokens
        self._tensors = SiteTensors(tensors)

    @classmethod
    def default_learning_rate(cls, config: Any) -> float:
        """5e-3: decided here."""
        return 5e-3

    @classmethod
    def build(cls, base: Base, config: Any) -> Self:
        """Raises PrefixError for a base that is not causal, and without symbols."""
        _shapes(find_sites(base.model), config)
        weights: Tensor = base.model.get_input_embeddings().weight.detach().float().cpu()  # type: ignore[operator]
        pieces = [base.tokenizer(_words(symbol), add_special_tokens=False)["input_ids"] for symbol in config.tokens]
        rows = torch.stack([weights[ids].mean(dim=0) for ids in pieces])
        return cls(config, {_ROWS: rows + config.initial_noise * weights.std() * torch.randn_like(rows)})

    @classmethod
    def restore(cls, sites: Sites, config: Any, tensors: Mapping[str, Tensor]) -> Self:
        return cls(config, checked(tensors, _shapes(sites, config))).requires_grad_(False).eval()

    @property
    def symbols(self) -> tuple[str, ...]:
        return self._symbols

    def new_tokens(self) -> Tensor:
        return self._tensors.named(_ROWS)

    def kept_tensors(self) -> dict[str, Tensor]:
        return self._tensors.kept()


def _shapes(sites: Sites, config: SpecialTokensConfig) -> dict[str, tuple[int, ...]]:
    if not sites.is_causal:
        raise PrefixError("new tokens need a causal base")
    if not config.tokens or len(set(config.tokens)) < len(config.tokens) or not all(config.tokens):
        raise ConfigError("config.tokens: name the new tokens, each once")
    return {_ROWS: (len(config.tokens), sites.hidden_size)}


def _words(symbol: str) -> str:
    """`[IN:GET_WEATHER` -> ` get weather`; what has no letters is its own word."""
    words = re.findall(r"[A-Za-z]+", symbol.rpartition(":")[2])
    return f" {' '.join(words).lower()}" if words else symbol
