"""What a base costs to use and to train on, and a prefix to store: T-Few's accounting (arXiv 2205.05638, 4.2)."""

from __future__ import annotations

from typing import NamedTuple

from transformers import PreTrainedModel


class FlopAToken(NamedTuple):
    """Floating-point operations for a token."""

    inference: int
    training: int


BYTES_A_VALUE = 4
"""Kept tensors are float32."""


def storage_bytes(num_values: int) -> int:
    """Of a kept prefix of so many values, its card left out."""
    return BYTES_A_VALUE * num_values


def flop_a_token(model: PreTrainedModel) -> FlopAToken:
    """2N to read a token with N parameters and 6N to train on it; half of each in an encoder-decoder.

    A token of an encoder-decoder passes half of the parameters. Tied parameters count once; what is attached does not
    count, and neither does attention over earlier tokens.
    """
    count = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("antefix."))
    parts = 2 if model.config.is_encoder_decoder else 1
    return FlopAToken(2 * count // parts, 6 * count // parts)
