"""Mix-and-match adapter (He et al. 2022, arXiv 2110.04366): a short prefix, and scaled parallel adapters.

The best mixture of the paper: 30 slots in attention, networks of width 512 beside the feed-forward layers, times 4. It
is the union of `prefix_tuning` and `adapter` with these choices.
"""

from __future__ import annotations

from pydantic import Field

from antefix.methods.adapter import AdapterConfig
from antefix.methods.prefix_tuning import PrefixTuningConfig
from antefix.methods.union import Union, UnionConfig


class MamConfig(UnionConfig):
    """The choices of both."""

    prefix_tuning: PrefixTuningConfig = Field(default_factory=lambda: PrefixTuningConfig(num_virtual_tokens=30))
    """The slots' choices; 30 of them."""
    adapter: AdapterConfig = Field(default_factory=lambda: AdapterConfig(form="parallel", width=512, scale=4.0))
    """The networks' choices; `parallel`, 512 wide, times 4."""


class Mam(Union):
    """Slots and parallel adapters."""

    members = ("prefix_tuning", "adapter")
    Config = MamConfig
    summary = "slots and parallel adapters (mix-and-match adapter, He et al. 2022)"
    paper = "arXiv 2110.04366"
    parts = ("key/value slots", "networks of states")
