"""Hierarchical blocking (discourse-aware soft prompting, Ghazvininejad et al. 2022, arXiv 2112.05717).

Input and output are cut into segments, and the slots into as many equal blocks. Below layer l* a token sees the slots
of its own segment's block alone (uniform blocking), from l* on all of them; tokens see each other as ever. With one
block this is prefix-tuning.

No code was released and the abstract gives no numbers; decided here: l* is half of the layers. A source's tokens are
cut at equal fractions of its own length. How long a target becomes nobody knows while it is written, so its tokens are
cut at fractions of `target_tokens`, in training and generation alike, and what is longer belongs to the last segment.
In cross-attention it is the decoder's token whose segment counts. A source's last token, which predicts the first of
the target, belongs to the target's first segment.

Axes: B rows, T queries, P slots, H query heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from antefix.attention.branch import Call, Places
from antefix.attention.slot_share import SlotBranch
from antefix.methods.branched_slots import BranchedSlots
from antefix.methods.prefix_tuning import PrefixTuningConfig
from antefix.parts.key_value import KeyValue
from antefix.sites import Site


class HierarchicalBlockingConfig(PrefixTuningConfig):
    """The choices of hierarchical blocking: those of prefix-tuning, and how texts are cut."""

    blocks: int = Field(2, ge=1)
    """Segments of a source, of a target, and blocks of slots."""
    blocked_layers: float = Field(0.5, ge=0, le=1)
    """The part of the layers, from below, whose slots are blocked; 1: uniform blocking."""
    target_tokens: int = Field(64, ge=1)
    """The length that targets are cut by."""

    @model_validator(mode="after")
    def _every_block_has_a_slot(self) -> Self:
        if self.num_virtual_tokens is not None and self.blocks > self.num_virtual_tokens:
            raise ValueError(f"{self.blocks} blocks of {self.num_virtual_tokens} slots: give each block a slot")
        return self


class BlockedBranch(SlotBranch):
    """Slots whose block must be the query's segment."""

    def __init__(self, slots: KeyValue, blocks: int, target_tokens: int) -> None:
        super().__init__(*slots)
        self._blocks, self._target_tokens = blocks, target_tokens

    def changed(self, call: Call, scores_BHTP: Tensor) -> Tensor:
        P = scores_BHTP.shape[-1]
        block_P = torch.arange(P, device=scores_BHTP.device) * self._blocks // P
        seen_BTP = segments(call.places(), self._blocks, self._target_tokens)[..., None] == block_P
        return scores_BHTP.masked_fill(~seen_BTP[:, None], -torch.inf)


def segments(places: Places, count: int, target_tokens: int) -> Tensor:
    """Which of so many segments of its part every token is in: (B or 1, T)."""
    length = torch.where(places.is_target, target_tokens, places.source_length.clamp(min=1))
    return (places.index * count // length).clamp(max=count - 1)


class HierarchicalBlocking(BranchedSlots):
    """One prefix in blocks."""

    Config = HierarchicalBlockingConfig
    summary = "blocks of slots for segments of the text, in the lower layers (Ghazvininejad et al. 2022)"
    paper = "arXiv 2112.05717"

    @property
    def needs_places(self) -> bool:
        return bool(self.config.blocks > 1)

    def is_blocked(self, site: Site) -> bool:
        """Whether the slots of a site are in blocks."""
        depth = 1 + max(s.layer for s in self._known_sites.values() if s.kind == site.kind)
        return bool(self.config.blocks > 1 and site.layer < self.config.blocked_layers * depth)

    def is_branched(self, site: Site) -> bool:
        return self.is_blocked(site)

    def branch(self, site: Site, slots: KeyValue, own: Mapping[str, Tensor]) -> SlotBranch:
        return BlockedBranch(slots, self.config.blocks, self.config.target_tokens)
