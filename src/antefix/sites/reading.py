"""A forward pass through a base as it is, with its attention calls recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from antefix.attention.hook import RecordedCall, recording

# Two unlike lengths, so that a cross-attention call shows itself by its number of keys.
ENCODER_TOKENS, DECODER_TOKENS = 3, 2
Watching = Callable[[list[RecordedCall]], AbstractContextManager[None]]


def some_ids(model: PreTrainedModel, count: int) -> Tensor:
    """Tokens to look with; none of them padding, which some models count positions by."""
    ids = [i for i in range(count + 1) if i != getattr(model.config.get_text_config(), "pad_token_id", None)]
    return torch.tensor([ids[:count]], device=model.device)


def recorded(
    model: PreTrainedModel,
    encoder_ids: Tensor,
    decoder_ids: Tensor,
    first_position: int | None,
    watching: Watching = lambda calls: nullcontext(),
) -> list[RecordedCall]:
    """Every attention call of one forward pass. watching: entered around it with what is recorded so far, a list that
    grows. An encoder-decoder is given both texts, other models the decoder's."""
    inputs = {"input_ids": decoder_ids, "attention_mask": torch.ones_like(decoder_ids)}
    if model.config.is_encoder_decoder:
        inputs = {
            "input_ids": encoder_ids,
            "attention_mask": torch.ones_like(encoder_ids),
            "decoder_input_ids": decoder_ids,
        }
    elif first_position is not None:
        length = decoder_ids.shape[1]
        inputs["position_ids"] = torch.arange(first_position, first_position + length, device=decoder_ids.device)[None]
    with in_eval_mode(model), recording(model) as calls, watching(calls):
        model(**inputs, use_cache=False)
    return calls


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module as in evaluation: without dropout, without activation checkpointing."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
