"""Second texts: what an example has beside its source, as states of the frozen encoder.

PIP reads a target's parse this way (Wan et al. 2023, arXiv 2305.16701).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from antefix.attention.branch import Condition
from antefix.attention.hook import bare


@torch.no_grad()
def read_condition(model: PreTrainedModel, texts: Sequence[Sequence[int]], length: int) -> Condition:
    """What the bare encoder of an encoder-decoder makes of these token ids, (B, length, C); zeros after a text's end.

    No text is longer than `length`; a row without one has zeros.
    """
    if not any(texts):
        embeddings: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
        nothing = embeddings.new_zeros(len(texts), length, embeddings.shape[1])
        return Condition(nothing, nothing[..., 0].bool())
    rows = [torch.tensor(ids, dtype=torch.long) for ids in texts]
    mask = pad_sequence([torch.ones_like(r) for r in rows], batch_first=True).to(model.device)
    with bare():
        states = model.get_encoder()(
            input_ids=pad_sequence(rows, batch_first=True).to(model.device), attention_mask=mask
        )[0]
    missing = length - mask.shape[1]
    is_there = torch.nn.functional.pad(mask, (0, missing)).bool()
    return Condition(torch.nn.functional.pad(states, (0, 0, 0, missing)) * is_there[..., None], is_there)
