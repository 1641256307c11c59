"""How likely the choices of examples are.

Axes: N labels, M choices of all examples, E examples, K choices of one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from antefix.batches.batch import Choices


def choice_scores(losses_N: Tensor, pair_N: Tensor, choices: Choices, length_norm: float) -> Tensor:
    """The score of every choice, (E, K): sum of log p over T^length_norm; -inf where an example has fewer choices.

    losses_N: -log p of every token of every choice. pair_N: to which choice it belongs.
    """
    zeros_M = losses_N.new_zeros(len(choices.example_M))
    sums_M = zeros_M.index_add(0, pair_N, losses_N)
    lengths_M = zeros_M.index_add(0, pair_N, torch.ones_like(losses_N))
    shape = (len(choices.right_E), int(choices.place_M.max()) + 1)
    scores_EK = losses_N.new_full(shape, -torch.inf)
    return scores_EK.index_put((choices.example_M, choices.place_M), -sums_M / lengths_M**length_norm)
