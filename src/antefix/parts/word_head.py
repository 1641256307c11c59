"""A head that reads labels off the base's own words: a verbaliser (Schick and Schütze 2021, arXiv 2001.07676).

A label's score is the logit of its word, at the place where that word would be written. Nothing is learned here.

Axes: N places, V words of the base, K labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from antefix.errors import PrefixError
from antefix.parts.label_head import LabelHead


class WordHead(nn.Module):
    """The logits of a base, at a few words."""

    reads_logits: ClassVar[bool] = True

    def __init__(self, model: PreTrainedModel, word_ids: Sequence[int]) -> None:
        """Raises PrefixError for a base without an output head."""
        super().__init__()
        if not model.can_generate() or model.get_output_embeddings() is None:  # type: ignore[no-untyped-call]
            raise PrefixError("words for labels need a causal base with an output head: leave `words` out")
        self.register_buffer("word_ids", torch.tensor(list(word_ids)), persistent=False)

    def forward(self, logits_NV: Tensor) -> Tensor:
        """(N, K), in float32."""
        return logits_NV[:, self.get_buffer("word_ids")].float()

    def kept(self) -> dict[str, Tensor]:
        """Nothing: the words stand in the card."""
        return {}


Head = LabelHead | WordHead
