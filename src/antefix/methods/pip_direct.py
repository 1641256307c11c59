"""PIP-Direct (Wan et al. 2023, arXiv 2305.16701): a parse in the place of a prefix's values.

Prefix-tuning of an encoder-decoder, but that in the last encoder layer the values of slot i are what the frozen encoder
makes of token i of a second text, the target's parse:

    P_v^(last)[i] = e_i,  split into heads

Keys there, and all other slots, are learned. Slots beyond the text's length are masked (the released code attends to
padding; its mask gives slots +1, here it is 0). A second text has at most `num_virtual_tokens` tokens. What is kept has
no values at that site: they are read anew from every example's text.

Axes: B rows, T queries, P slots, H query heads, G key/value heads, D key width, C width of hidden states.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from antefix.attention.branch import Call
from antefix.attention.slot_share import SlotBranch
from antefix.base import Base
from antefix.errors import PrefixError
from antefix.methods.branched_slots import BranchedSlots
from antefix.methods.prefix_tuning import PrefixTuningConfig
from antefix.parts.key_value import KeyValue
from antefix.sites import Site, Sites, find_sites


class PipDirectConfig(PrefixTuningConfig):
    """The choices of PIP-Direct: those of prefix-tuning."""


SECOND_TEXT = ("a second text for every example",)
"""What the two of them need."""


class ConditionBranch(SlotBranch):
    """Learned keys (G, P, D), and values from the rows' second texts."""

    def changed(self, call: Call, scores_BHTP: Tensor) -> Tensor:
        is_there_BP = call.condition().is_there_BP
        return scores_BHTP.masked_fill(~is_there_BP[:, None, None, : scores_BHTP.shape[-1]], -torch.inf)

    def value(self, call: Call) -> Tensor:
        num_heads, num_slots = self.key_GPD.shape[:2]
        states_BPC = call.condition().states_BPC[:, :num_slots].to(self.key_GPD.dtype)
        return states_BPC.view(*states_BPC.shape[:2], num_heads, -1).transpose(1, 2)


class PipDirect(BranchedSlots):
    """One parse-instructed prefix."""

    Config = PipDirectConfig
    summary = "a prefix whose values in the last encoder layer are a second text's states (PIP-Direct, 2023)"
    paper = "arXiv 2305.16701"
    parts = ("key/value slots", "values from a second text")
    needs = SECOND_TEXT

    @classmethod
    def build(cls, base: Base, config: Any) -> Self:
        last_encoder_site(find_sites(base.model))
        return super().build(base, config)

    @classmethod
    def keys_only(cls, sites: Sites) -> Collection[str]:
        return (last_encoder_site(sites).name,)

    @property
    def condition_length(self) -> int:
        return self.num_virtual_tokens

    def is_branched(self, site: Site) -> bool:
        return site.name in self._keys_only

    def branch(self, site: Site, slots: KeyValue, own: Mapping[str, Tensor]) -> SlotBranch:
        return ConditionBranch(*slots)

    def kept_tensors(self) -> dict[str, Tensor]:
        without = {f"{name}.value" for name in self._keys_only}
        return {n: t for n, t in super().kept_tensors().items() if n not in without}


def last_encoder_site(sites: Sites) -> Site:
    """Where a second text comes in. Raises PrefixError for a base that has no such place."""
    encoder = sites.of_kinds(("encoder_self",))
    if not sites.is_encoder_decoder or not encoder:
        raise PrefixError("this method reads a second text by the encoder of an encoder-decoder (BART); take one")
    site = encoder[-1]
    if site.num_key_value_heads * site.value_width != site.hidden_width:
        raise PrefixError(
            f"{site.name} has {site.num_key_value_heads} heads of width {site.value_width} and states of width "
            f"{site.hidden_width}: a state must split into heads, as in BART"
        )
    return site
