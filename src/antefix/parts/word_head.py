"""A head that reads labels off the base's own words: a verbaliser (Schick and Schütze 2021, arXiv 2001.07676).

A label's score is the logit of its word, at the place where that word would be written. Nothing is learned here.

Axes: N states, C width of hidden states, K labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from antefix.errors import PrefixError
from antefix.parts.label_head import LabelHead


class WordHead(nn.Module):
    """The output head of a base, at a few words."""

    def __init__(self, model: PreTrainedModel, word_ids: Sequence[int]) -> None:
        """Raises PrefixError for a base without an output head that takes last hidden states."""
        super().__init__()
        head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        if not model.can_generate() or not isinstance(head, nn.Linear):
            raise PrefixError("words for labels need a causal base with an output head: leave `words` out")
        self._head = (head,)  # in a tuple: it is the base's, no part of this module
        self._cap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        self.register_buffer("word_ids", torch.tensor(list(word_ids)), persistent=False)

    def forward(self, states_NC: Tensor) -> Tensor:
        """(N, K), in float32."""
        (head,) = self._head
        word_ids = self.get_buffer("word_ids")
        scores = states_NC.float() @ head.weight[word_ids].float().T
        if head.bias is not None:
            scores = scores + head.bias[word_ids].float()
        return scores if self._cap is None else self._cap * torch.tanh(scores / self._cap)

    def kept(self) -> dict[str, Tensor]:
        """Nothing: the words stand in the card."""
        return {}


Head = LabelHead | WordHead
