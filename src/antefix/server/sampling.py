"""Which token comes next, for one row, whatever its neighbours are.

A row keeps its own count of what it has written, and draws from its own generator.

Axes: T places of a prompt, V words of the base.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import TopPLogitsWarper

from antefix.server.messages import Sampling, Top

_AT_ONCE = 128
"""Places of a prompt that are scored together: a vocabulary's width of numbers for each."""


class Sampler:
    """Chooses the tokens of one job."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._written: Counter[int] = Counter()
        self._bias_ids = torch.tensor(list(sampling.logit_bias), dtype=torch.long)
        self._bias = torch.tensor(list(sampling.logit_bias.values()))
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)
        self._top_p = TopPLogitsWarper(float(sampling.top_p)) if sampling.top_p < 1.0 else None

    def next(self, logits_V: Tensor) -> tuple[int, float | None, Top]:
        """The next token, its log-probability and the likeliest ones. logits_V: float32."""
        chosen = self._choose(self._changed(logits_V))
        self._written[chosen] += 1
        if self._sampling.logprobs is None:
            return chosen, None, ()
        logprobs_V = torch.log_softmax(logits_V, dim=0)
        return chosen, float(logprobs_V[chosen]), likeliest(logprobs_V, self._sampling.logprobs)

    def _changed(self, logits_V: Tensor) -> Tensor:
        """With bias and penalties."""
        sampling = self._sampling
        penalised = self._written and (sampling.frequency_penalty != 0.0 or sampling.presence_penalty != 0.0)
        if not penalised and not len(self._bias_ids):
            return logits_V
        logits_V = logits_V.index_add(0, self._bias_ids, self._bias)
        if penalised:
            ids, counts = torch.tensor(list(self._written.items())).unbind(1)
            penalty = counts * sampling.frequency_penalty + sampling.presence_penalty
            logits_V = logits_V.index_add(0, ids, -penalty)
        return logits_V

    def _choose(self, logits_V: Tensor) -> int:
        if self._sampling.temperature == 0.0:
            return int(logits_V.argmax())
        # The largest is 0 before it is divided, in double precision: a tiny temperature makes no infinity of it.
        warmed_V = ((logits_V - logits_V.max()).double() / self._sampling.temperature).float()
        if self._top_p is not None:
            no_ids = torch.empty(1, 0, dtype=torch.long)  # it looks at logits alone
            warmed_V = self._top_p(no_ids, warmed_V[None])[0]
        return int(torch.multinomial(torch.softmax(warmed_V, dim=0), 1, generator=self._generator))


def likeliest(logprobs_V: Tensor, count: int) -> Top:
    """So many tokens with the highest log-probabilities, the likeliest first; impossible ones are left out."""
    values, ids = logprobs_V.topk(min(count, len(logprobs_V)))
    return tuple((i, v) for i, v in zip(ids.tolist(), values.tolist(), strict=True) if v > -torch.inf)


def scores_of(logits_TV: Tensor, followers: Sequence[int], num_top: int) -> tuple[list[float], list[Top]]:
    """The log-probability of the token that follows each place, and the likeliest ones there.

    logits_TV: float32, at as many places as there are followers, or one more: nothing follows the last one then.
    """
    logprobs: list[float] = []
    top: list[Top] = []
    for begin in range(0, len(followers), _AT_ONCE):
        here = followers[begin : begin + _AT_ONCE]
        of_places = torch.log_softmax(logits_TV[begin : begin + len(here)], dim=1)
        logprobs += of_places.gather(1, torch.tensor(here)[:, None])[:, 0].tolist()
        top += [likeliest(one, num_top) for one in of_places]
    return logprobs, top
