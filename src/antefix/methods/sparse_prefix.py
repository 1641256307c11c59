"""Sparse attention to a prefix (discourse-aware soft prompting, Ghazvininejad et al. 2022, arXiv 2112.05717).

Two forms, at every layer:

- soft: scores of slots are divided by a temperature tau = exp(theta), learned per site, from theta = 0;
- truncated: of the slots only those with the most attention are seen, the others get a score of -inf. `top_k` keeps
  so many, `top_p` the smallest set whose attention adds up to this part.

With all slots kept and tau = 1 this is prefix-tuning. `blocks` adds hierarchical blocking.

No code was released, and the order of truncation and softmax is not known; decided here: per site, head and text, by
the mean attention among the slots over the text's source (its last token included; in an encoder-decoder's decoder,
over its start token), which no later token changes, so that decoding and training agree. Choosing has no gradient.

Axes: B rows, T queries, P slots, H query heads, X all heads and slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from antefix.attention.branch import Call
from antefix.attention.slot_share import SlotBranch
from antefix.methods.hierarchical_blocking import BlockedBranch, HierarchicalBlocking, HierarchicalBlockingConfig
from antefix.parts.key_value import KeyValue
from antefix.parts.site_tensors import Shapes
from antefix.sites import Site


class SparsePrefixConfig(HierarchicalBlockingConfig):
    """The choices of a sparse prefix: those of hierarchical blocking, without blocks, and how slots are chosen."""

    blocks: int = Field(1, ge=1)
    """Segments of a source, of a target, and blocks of slots; 1: no blocking."""
    soft: bool = True
    """A learned temperature at every site."""
    top_k: int | None = Field(None, ge=1)
    """So many slots are seen; None: all."""
    top_p: float | None = Field(None, gt=0, le=1)
    """The slots are seen whose attention adds up to this part; None: all."""

    @model_validator(mode="after")
    def _makes_sense(self) -> SparsePrefixConfig:
        if self.top_k is not None and self.top_p is not None:
            raise ValueError("top_k or top_p, not both")
        return self

    @property
    def leaves_out(self) -> bool:
        """Whether some slots may not be seen."""
        return self.top_k is not None or (self.top_p is not None and self.top_p < 1)


class SparseBranch(BlockedBranch):
    """Slots with a temperature, of which some are seen."""

    def __init__(self, slots: KeyValue, config: SparsePrefixConfig, blocks: int, theta: Tensor | None) -> None:
        super().__init__(slots, blocks, config.target_tokens)
        self._config, self._theta = config, theta

    def changed(self, call: Call, scores_BHTP: Tensor) -> Tensor:
        if self._theta is not None:
            scores_BHTP = scores_BHTP * torch.exp(-self._theta)
        if self._config.leaves_out:
            scores_BHTP = scores_BHTP.masked_fill(~self._seen(call, scores_BHTP), -torch.inf)
        return super().changed(call, scores_BHTP) if self._blocks > 1 else scores_BHTP

    @torch.no_grad()
    def _seen(self, call: Call, scores_BHTP: Tensor) -> Tensor:
        """(B, H, T, P)."""
        B, H, T, P = scores_BHTP.shape
        attention_BTX = torch.softmax(scores_BHTP, dim=-1).transpose(1, 2).reshape(B, T, H * P)
        mean = call.of_prompt("attention", attention_BTX, call.whole_prompt())
        mean_BHTP = mean.view(mean.shape[0], -1, H, P).transpose(1, 2)
        order = mean_BHTP.argsort(dim=-1, descending=True, stable=True)
        top_k, top_p = self._config.top_k, self._config.top_p
        if top_k is not None:
            kept = torch.arange(P, device=order.device).expand(order.shape) < top_k
        else:
            assert top_p is not None
            sorted_mean = mean_BHTP.gather(-1, order)
            kept = sorted_mean.cumsum(-1) - sorted_mean < top_p * sorted_mean.sum(-1, keepdim=True)
        return torch.zeros_like(kept).scatter(-1, order, kept)


class SparsePrefix(HierarchicalBlocking):
    """One sparse prefix."""

    Config = SparsePrefixConfig
    summary = "few slots seen, or sharper attention to them (Ghazvininejad et al. 2022)"
    paper = "arXiv 2112.05717"
    parts = ("key/value slots", "temperatures")

    @property
    def needs_places(self) -> bool:
        config: Any = self.config
        return super().needs_places or bool(config.leaves_out)

    @classmethod
    def shapes(cls, site: Site, config: Any, num_slots: int) -> Shapes:
        return {"theta": (1,)} if config.soft else {}

    @classmethod
    def initial_of(cls, part: str, shape: tuple[int, ...], config: Any) -> Tensor:
        return torch.zeros(shape)

    def is_branched(self, site: Site) -> bool:
        return bool(self.config.soft or self.config.leaves_out or self.is_blocked(site))

    def branch(self, site: Site, slots: KeyValue, own: Mapping[str, Tensor]) -> SlotBranch:
        blocks = self.config.blocks if self.is_blocked(site) else 1
        return SparseBranch(slots, self.config, blocks, own.get("theta"))
