"""Ranks of right answers among all answers, and what link prediction makes of them. Not for texts: ranks alone.

MR is the mean rank, MRR the mean of its inverse, Hits@k the share of ranks of at most k. Nothing to rank is an error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from antefix.errors import MetricError

HITS = (1, 3, 10)


def rank(right: float, others: Sequence[float]) -> float:
    """1 + how many others score higher + half of those that score the same: the mean over all orders of ties.

    Raises MetricError for a score that is no number.
    """
    if math.isnan(right) or any(map(math.isnan, others)):
        raise MetricError("a score is no number (nan), it has no rank: the model's likelihoods have overflowed")
    return 1 + sum(other > right for other in others) + sum(other == right for other in others) / 2


def rank_scores(ranks: Sequence[float]) -> dict[str, float]:
    """MR, MRR and Hits@k of at least one rank."""
    mean = {"mr": sum(ranks) / len(ranks), "mrr": sum(1 / one for one in ranks) / len(ranks)}
    return mean | {f"hits_at_{k}": sum(one <= k for one in ranks) / len(ranks) for k in HITS}
