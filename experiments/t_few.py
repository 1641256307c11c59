"""T-Few on a frozen base: (IA)^3 with three losses over choices (Liu et al. 2022, arXiv 2205.05638, section 3.5).

Adafactor at 3e-3 with steps scaled by a parameter's size, eight examples a step, 6 % warm-up, no dev set: the last step
is kept. T-Few starts from vectors that were trained on many tasks; these start at one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import antefix
from antefix.data.example import Example
from antefix.data.linearise import TextFormat
from antefix.training.recipe import TrainingRecipe

STEPS, EXAMPLES_A_STEP = 1000, 8
"""As in the paper, for all of its tasks."""
TRAINED = 170.0
"""Tokens a second, for estimates: SmolLM2-135M on one core. Batches of choices are larger than others."""


def trained(
    base: antefix.Base, examples: Sequence[Example], text_format: TextFormat, *, seed: int, run_folder: Path
) -> antefix.Prefix:
    """On examples with choices; checkpoints go to `run_folder`."""
    training = TrainingRecipe(
        max_steps=STEPS, pairs_per_step=EXAMPLES_A_STEP, optimiser="adafactor", learning_rate=3e-3,
        warmup_steps=round(0.06 * STEPS), evaluations=0, seed=seed,
    )  # fmt: skip
    return antefix.train(
        base, examples, dev=(), method="ia3", task="ranking", text_format=text_format, training=training,
        run_folder=run_folder,
    )  # fmt: skip
