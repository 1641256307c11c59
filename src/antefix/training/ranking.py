"""Losses of examples with choices, of which one is right (T-Few, Liu et al. 2022, arXiv 2205.05638, section 3.2).

With y the right choice of T tokens, y^(n) the wrong ones of T^(n), and p the probability of a token:

    L_LM = -(1/T) sum_t log p(y_t)                                            over all right tokens of a step
    L_UL = -sum_n sum_t log(1 - p(y^(n)_t) + 0.01) / sum_n T^(n)              over all wrong tokens of a step
    L_LN = -log softmax over choices of (1/T) sum_t log p, at the right one   the mean over examples

The 0.01 inside the logarithm is the released code's; a choice's end token counts among its tokens.

Axes: N labels, E examples, K choices of one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from antefix.batches.batch import Choices
from antefix.batches.choices import choice_scores
from antefix.training.objectives import RankingWeights, StepSize

_FLOOR = 0.01


def ranking_loss(losses_N: Tensor, pair_N: Tensor, choices: Choices, size: StepSize, weights: RankingWeights) -> Tensor:
    """What a part of a step adds to the step's loss. losses_N: -log p of every token of every choice."""
    right_N = choices.is_right[pair_N]
    scores_EK = choice_scores(losses_N, pair_N, choices, weights.length_norm)
    total = weights.language_model * losses_N[right_N].sum() / size.num_right_tokens
    if weights.unlikelihood > 0 and size.num_wrong_tokens > 0:
        unlikely = torch.log(1 - torch.exp(-losses_N[~right_N]) + _FLOOR)
        total = total - weights.unlikelihood * unlikely.sum() / size.num_wrong_tokens
    chosen = torch.nn.functional.cross_entropy(scores_EK, choices.right_E, reduction="sum")
    return total + weights.length_normalised * chosen / size.num_pairs
