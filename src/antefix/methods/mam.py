"""Mix-and-match adapter (He et al. 2022, arXiv 2110.04366): a short prefix, and scaled parallel adapters.

The best mixture of the paper: 30 slots in attention, networks of width 512 beside the feed-forward layers, times 4. It
is the union of `prefix_tuning` and `adapter` with these choices.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from antefix.methods.adapter import AdapterConfig
from antefix.methods.prefix_tuning import PrefixTuningConfig
from antefix.methods.union import Union, UnionConfig

_SLOTS: dict[str, Any] = {"num_virtual_tokens": 30}
_NETWORKS: dict[str, Any] = {"form": "parallel", "width": 512, "scale": 4.0}


class MamConfig(UnionConfig):
    """The choices of both."""

    prefix_tuning: PrefixTuningConfig = Field(default_factory=lambda: PrefixTuningConfig(**_SLOTS))
    """The slots' choices; 30 of them."""
    adapter: AdapterConfig = Field(default_factory=lambda: AdapterConfig(**_NETWORKS))
    """The networks' choices; `parallel`, 512 wide, times 4."""

    @model_validator(mode="before")
    @classmethod
    def _the_papers_where_nothing_is_said(cls, given: Any) -> Any:
        """One choice given leaves the others the paper's, not those of the methods alone."""
        if not isinstance(given, dict):
            return given
        defaults = {"prefix_tuning": _SLOTS, "adapter": _NETWORKS}
        return {n: defaults[n] | v if n in defaults and isinstance(v, dict) else v for n, v in given.items()}


class Mam(Union):
    """Slots and parallel adapters."""

    members = ("prefix_tuning", "adapter")
    Config = MamConfig
    summary = "slots and parallel adapters (mix-and-match adapter, He et al. 2022)"
    paper = "arXiv 2110.04366"
    parts = ("key/value slots", "networks of states")
