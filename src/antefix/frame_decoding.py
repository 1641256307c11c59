"""Decoding that writes well-formed frames and nothing else (see `antefix.data.frames`).

Of every row's likeliest tokens those are kept that a frame can go on with, however its symbols are cut into tokens.
Where the text would be cut off before its brackets are closed, they are closed in time.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from antefix.data.frames import begins_frame, num_open

_SPACES = re.compile(r"\s+")
_LOOKED_AT = 64
"""Of a row's likeliest tokens; where none of them fits, the first that does is taken."""
_SPARE = 6
"""Tokens left when brackets begin to be closed, beside two for each."""


class OnlyFrames(LogitsProcessor):
    """What `generate` asks before every token."""

    def __init__(
        self, tokenizers: Sequence[PreTrainedTokenizerBase], prompt_length: int, stop: int, max_new_tokens: int,
        num_beams: int, labels: Sequence[str],
    ) -> None:  # fmt: skip
        """tokenizers: of every source. labels: those that may be written; empty: any."""
        self._tokenizers, self._prompt_length, self._stop = tokenizers, prompt_length, stop
        self._max_new_tokens, self._num_kept, self._labels = max_new_tokens, 2 * num_beams, labels

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores of tokens that fit; -inf for all others."""
        kept = torch.full_like(scores, -torch.inf)
        beams = len(input_ids) // len(self._tokenizers)
        for row, ids in enumerate(input_ids[:, self._prompt_length :].tolist()):
            tokens = self._fitting(self._tokenizers[row // beams], ids, scores[row])
            kept[row, tokens] = scores[row, tokens].clamp(min=torch.finfo(scores.dtype).min)
        return kept

    def _fitting(self, tokenizer: PreTrainedTokenizerBase, ids: list[int], scores: Tensor) -> list[int]:
        text = _text(tokenizer, ids)
        depth = num_open(text)
        if depth is None or self._stop in ids:
            return [self._stop]
        closing: list[int] = tokenizer("]" if text.endswith(" ") else " ]", add_special_tokens=False)["input_ids"]
        left = self._max_new_tokens - len(ids)
        # A label may be cut off, and a bracket of its own may take two tokens: in time is a little early.
        if depth and left <= 2 * depth + _SPARE and begins_frame(f"{text}]", self._labels):
            return closing[:1]
        likely = scores.topk(min(_LOOKED_AT, scores.shape[-1])).indices.tolist()
        fitting = islice((t for t in likely if self._fits(tokenizer, ids, text, t)), self._num_kept)
        found = list(fitting) or list(islice((t for t in range(len(scores)) if self._fits(tokenizer, ids, text, t)), 1))
        return found or [self._stop]

    def _fits(self, tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str, token: int) -> bool:
        """Whether a frame can go on with a token, and does: many say nothing, or one space after another."""
        longer = _text(tokenizer, [*ids, token])
        return token != self._stop and _said(longer) != _said(text) and begins_frame(longer, self._labels)


def _said(text: str) -> str:
    return _SPACES.sub(" ", text).lstrip()


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))
