"""Infix-tuning in key/value form (Li & Liang 2021, section 7.3: [x; INFIX; y]): slots that targets alone see.

The last token of a source is the first that sees them, since it predicts the target's first token. Everything before it
is read as the base reads it: the hidden states of a source never depend on what is learned, and can be computed once
for all epochs (`training.keep_source_states`). With a source of a single token this is prefix-tuning.

In an encoder-decoder base the slots stand in the decoder and in its cross-attention; the encoder stays the base's.
"""

from __future__ import annotations

from typing import Literal

from antefix.methods.prefix_tuning import PrefixTuning, PrefixTuningConfig

DecoderKind = Literal["self", "cross"]


class InfixConfig(PrefixTuningConfig):
    """The choices of infix-tuning: those of prefix-tuning, but for where slots and tokens can stand."""

    sites: tuple[DecoderKind, ...] = ("self", "cross")
    """Where slots stand, of what the base has: `self`, `cross`."""
    positions: Literal["in_place"] = "in_place"
    """`in_place`: tokens count from 0; others would change how the source is read."""


class Infix(PrefixTuning):
    """One infix: a prefix whose slots targets alone see."""

    Config = InfixConfig
    summary = "learned keys and values that targets alone see (Li & Liang 2021, section 7.3)"

    @property
    def for_targets(self) -> bool:
        return True
