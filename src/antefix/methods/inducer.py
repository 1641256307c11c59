"""Inducer-tuning (Chen et al. 2022, arXiv 2210.14469): a virtual key and value for every query, in residual form.

Per head, with q the query, o_c attention over the tokens and L_c the log of its normaliser:

    k~ = q + MLP_k(q)
    lambda = sigmoid(s q . k~ - L_c)
    o = o_c + lambda MLP_v(q),      MLP(x) = tanh(x A + a) B + b

L_c goes over tokens alone, cached ones included. In all released settings MLP_v maps every head straight to the model's
width and is added after the output projection (`value_extension`), its b without lambda:

    out = W_O(concat o_c) + sum_h lambda_h tanh(q_h A_h + a_h) B_h + b

`gating_ablation` is the true share of the softmax instead, (1 - lambda) o_c + lambda MLP_v(q). All weights start as
N(0, 0.01), cut off at two: near the base; B = b = 0 is the base.

Axes: B rows, T queries, H query heads, D key width, R width of a network's hidden layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from antefix.attention.branch import Addend, Branch, Call, Residual, Share
from antefix.methods.at_sites import AtSites, AtSitesConfig
from antefix.parts.site_tensors import Shapes
from antefix.sites import Site


class InducerConfig(AtSitesConfig):
    """The choices of inducer-tuning."""

    key_width: int = Field(2, ge=0)
    """Width of the key network's hidden layer; 0: the virtual key is the query itself."""
    value_width: int = Field(4, ge=1)
    """Width of the value network's hidden layer."""
    value_extension: bool = True
    """The value network maps to the model's width, after the output projection; as in all released settings."""
    gating_ablation: bool = False
    """The true share of the softmax in the place of the residual form; without `value_extension`."""
    initial_scale: float = Field(0.01, ge=0)
    """Standard deviation of the first values."""

    @model_validator(mode="after")
    def _makes_sense(self) -> InducerConfig:
        if self.gating_ablation and self.value_extension:
            raise ValueError(
                "gating_ablation is a share of the softmax, before the projection: value_extension = false"
            )
        return self


class InducerBranch(Branch):
    """The two networks of one site; `tensors` by the names of `Inducer.shapes`."""

    def __init__(self, tensors: Mapping[str, Tensor], config: InducerConfig) -> None:
        self._tensors, self._config = tensors, config

    def __call__(self, call: Call) -> Addend | Residual | Share:
        t = self._tensors
        query = call.query_BHTD.to(t["value_in"].dtype)
        key = query
        if self._config.key_width > 0:
            key = query + _hidden(query, t["key_in"], t["key_in_bias"]) @ t["key_out"] + t["key_out_bias"][:, None]
        score_BHT = (query * key).sum(-1) * call.scores.scale
        hidden = _hidden(query, t["value_in"], t["value_in_bias"])
        if self._config.gating_ablation:
            value = hidden @ t["value_out"] + t["value_out_bias"][:, None]
            return Share(value, torch.ones_like(score_BHT), score_BHT)
        share_BHT = torch.sigmoid(score_BHT - call.tokens().lse_BHT).to(hidden.dtype)
        if self._config.value_extension:
            weighed = share_BHT[..., None] * hidden
            return Residual(torch.einsum("bhtr,hrc->btc", weighed, t["value_out"]) + t["value_out_bias"])
        return Addend(share_BHT[..., None] * (hidden @ t["value_out"] + t["value_out_bias"][:, None]))

    def tensors(self) -> Sequence[Tensor]:
        return tuple(self._tensors.values())


def _hidden(query_BHTD: Tensor, weight_HDR: Tensor, bias_HR: Tensor) -> Tensor:
    return torch.tanh(query_BHTD @ weight_HDR + bias_HR[:, None])


class Inducer(AtSites):
    """One pair of networks at every site."""

    Config = InducerConfig
    summary = "a virtual key and value for every query (inducer-tuning, Chen et al. 2022)"
    paper = "arXiv 2210.14469"
    parts = ("networks of queries",)

    @classmethod
    def default_learning_rate(cls, config: Any) -> float:
        """1.25e-3, as released for GPT-2 small."""
        return 1.25e-3

    @classmethod
    def shapes(cls, site: Site, config: Any) -> Shapes:
        H, D, E, C = site.num_heads, site.key_width, site.value_width, site.hidden_width
        R, S = config.key_width, config.value_width
        of_key = {"key_in": (H, D, R), "key_in_bias": (H, R), "key_out": (H, R, D), "key_out_bias": (H, D)}
        of_value: dict[str, tuple[int, ...]] = {"value_in": (H, D, S), "value_in_bias": (H, S)}
        if config.value_extension:
            of_value |= {"value_out": (H, S, C), "value_out_bias": (C,)}
        else:
            of_value |= {"value_out": (H, S, E), "value_out_bias": (H, E)}
        return of_value if R == 0 else of_key | of_value

    @classmethod
    def initial(cls, part: str, shape: tuple[int, ...], config: Any) -> Tensor:
        scale: float = config.initial_scale
        return torch.nn.init.trunc_normal_(torch.empty(shape), a=-2, b=2) * scale

    def branch(self, site: Site, tensors: Mapping[str, Tensor]) -> Branch:
        return InducerBranch(tensors, self.config)
