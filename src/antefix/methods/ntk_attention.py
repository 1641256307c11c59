"""NTK-Attention (Towards Infinite-Long Prefix in Transformer, arXiv 2406.14036): what sums over a prefix come to.

Both sums over slots in the softmax are linear in a feature map phi; they are learned themselves, at a cost that no
longer depends on how many slots there are (the released code):

    o = (sum_j e^(a_j) v_j + phi(q) Z) / (sum_j e^(a_j) + phi(q) . |k|),  a_j = s q . k_j
    phi(x) = elu(x sqrt(s)) + 1, elementwise

with Z (D, E) and k (D,) for every query head. Z = k = 0 is the base. In the released code k of exactly 0 never moves,
since |k| has no gradient there; here it starts at 1e-4 |N(0, 1)|, and Z at 0.

Z of low rank (`rank`): Z = Z_A Z_B, with Z_A ~ N(0, 0.02) and Z_B = 0. How the paper's features get another width than
D is not known; here they have D.

Axes: B rows, T queries, H query heads, D key width, E value width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import elu, softplus

from antefix.attention.branch import Branch, Call, Share
from antefix.methods.at_sites import AtSites, AtSitesConfig
from antefix.parts.site_tensors import Shapes
from antefix.sites import Site


class NtkAttentionConfig(AtSitesConfig):
    """The choices of NTK-Attention."""

    rank: int | None = Field(None, ge=1)
    """Rank of Z; None: full."""
    mass: Literal["absolute", "softplus"] = "absolute"
    """How k is kept positive: |k| as released, or softplus(k)."""
    initial_scale: float = Field(0.0, ge=0)
    """Standard deviation of the first values of Z (of Z_B, where it has a rank)."""


class NtkBranch(Branch):
    """Z (H, D, E) and the positive k (H, D) at one site."""

    def __init__(self, z_HDE: Tensor, mass_HD: Tensor) -> None:
        self._z_HDE, self._mass_HD = z_HDE, mass_HD

    def __call__(self, call: Call) -> Share:
        features = elu(call.query_BHTD.to(self._z_HDE.dtype) * call.scores.scale**0.5) + 1
        mass_BHT = (features * self._mass_HD[:, None]).sum(-1)
        return Share(features @ self._z_HDE, mass_BHT, torch.zeros_like(mass_BHT))

    def tensors(self) -> Sequence[Tensor]:
        return (self._z_HDE, self._mass_HD)


class NtkAttention(AtSites):
    """One learned pair of sums."""

    Config = NtkAttentionConfig
    summary = "the sums over an endless prefix, learned themselves (NTK-Attention, 2024)"
    paper = "arXiv 2406.14036"
    parts = ("kernel sums",)

    @classmethod
    def default_learning_rate(cls, config: Any) -> float:
        """1e-3, as in the released code."""
        return 1e-3

    @classmethod
    def shapes(cls, site: Site, config: Any) -> Shapes:
        H, D, E = site.num_heads, site.key_width, site.value_width
        if config.rank is None:
            return {"z": (H, D, E), "k": (H, D)}
        return {"z_a": (H, D, config.rank), "z_b": (H, config.rank, E), "k": (H, D)}

    @classmethod
    def initial(cls, part: str, shape: tuple[int, ...], config: Any) -> Tensor:
        if part == "z_a":
            return torch.randn(shape) * 0.02
        if part == "k":
            small = 1e-4 * torch.randn(shape).abs()
            return small if config.mass == "absolute" else torch.log(torch.expm1(small))
        scale: float = config.initial_scale
        return torch.randn(shape) * scale

    def branch(self, site: Site, tensors: Mapping[str, Tensor]) -> Branch:
        z = tensors["z"] if self.config.rank is None else tensors["z_a"] @ tensors["z_b"]
        return NtkBranch(z, tensors["k"].abs() if self.config.mass == "absolute" else softplus(tensors["k"]))
