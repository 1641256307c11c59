"""Decoding that writes well-formed frames and nothing else (see `antefix.data.frames`).

Of every row's likeliest tokens those are kept that a frame can go on with and be closed in time, however its symbols
are cut into tokens. Where as many tokens are left as the rest of the frame takes, that is what is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import islice

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from antefix.data.frames import ending

_SPACES = re.compile(r"\s+")
_LOOKED_AT = 64
"""Of a row's likeliest tokens; where none of them fits, the first that does is taken."""
_SPARE = 1
"""Tokens left beside those that the rest of a frame takes: what is written token by token may be cut otherwise."""


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
        left = self._max_new_tokens - len(ids)
        rest = self._rest(tokenizer, text)
        if not rest or self._stop in ids:
            return [self._stop]
        if len(rest) + _SPARE >= left:
            return rest[:1]
        likely = scores.topk(min(_LOOKED_AT, scores.shape[-1])).indices.tolist()

        def fitting(tokens: Iterable[int], count: int) -> list[int]:
            return list(islice((t for t in tokens if self._fits(tokenizer, ids, text, t, left - 1)), count))

        return fitting(likely, self._num_kept) or fitting(range(len(scores)), 1) or rest[:1]

    def _fits(self, tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str, token: int, left: int) -> bool:
        """Whether a frame can go on with a token and be closed in time, and does go on.

        Many tokens say nothing, or one space after another.
        """
        longer = _text(tokenizer, [*ids, token])
        if token == self._stop or _said(longer) == _said(text):
            return False
        rest = self._rest(tokenizer, longer)
        return rest is not None and len(rest) + _SPARE <= left

    def _rest(self, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int] | None:
        """The tokens that a text lacks to be a frame; None where it begins none."""
        rest = ending(text, self._labels)
        if rest is None:
            return None
        unspaced = rest.lstrip() if text.endswith(" ") else rest
        found: list[int] = tokenizer(unspaced, add_special_tokens=False)["input_ids"]
        return found


def _said(text: str) -> str:
    return _SPACES.sub(" ", text).lstrip()


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))
