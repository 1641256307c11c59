"""The base of most experiments, and how fast one core is with it: what the estimates of some rest on."""

from __future__ import annotations

import antefix

TRAINED, READ = 88.0, 200.0
"""Tokens a second, through a forward and a backward pass, and through a forward pass alone."""


def smollm() -> antefix.Base:
    """SmolLM2-135M in float32, in which full fine-tuning trains; on an accelerator where there is one."""
    return antefix.load_base("smollm2-135m", dtype="float32", device="auto")
