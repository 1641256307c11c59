"""P-tuning v2 (Liu et al. 2021, arXiv 2110.07602): prefix-tuning for understanding, with a linear head.

Slots at every layer, learned directly from N(0, 0.02), with dropout on keys and values in training; labels are read off
hidden states by a linear head, without a verbaliser (`task = "classification"` or `"tagging"`). With the same tensors
it is prefix-tuning. The released code can put a network (linear - tanh - linear) after the slots: `parametrisation`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from antefix.methods.prefix_tuning import PrefixTuning, PrefixTuningConfig


class PTuningV2Config(PrefixTuningConfig):
    """The choices of P-tuning v2: those of prefix-tuning, with other defaults."""

    num_virtual_tokens: int | None = Field(16, ge=1, le=1_000_000)
    """Slots a site: 8 to 128 in the released scripts, more for harder tasks."""
    initial: Literal["text", "normal", "uniform", "prefix"] = "normal"
    """First values: random, of real words, or of a kept prefix."""
    initial_scale: float = Field(0.02, gt=0)
    """Standard deviation of `normal`, upper end of `uniform`, for direct slots."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout on keys and values while training; 0.1 or 0.2 in the released scripts."""


class PTuningV2(PrefixTuning):
    """One prefix."""

    Config = PTuningV2Config
    summary = "learned keys and values from small random ones, for tasks that label (P-tuning v2, 2021)"
    paper = "arXiv 2110.07602"
    learns_relative_to_size = False

    @classmethod
    def default_learning_rate(cls, config: PrefixTuningConfig) -> float:
        """7e-3 for direct slots (5e-3 to 3e-2 in the released scripts); through a network as in prefix-tuning."""
        return 7e-3 if config.parametrisation == "direct" else super().default_learning_rate(config)
