"""A tokenizer that knows more tokens than its own: symbols of an output language, each one token."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class WithSymbols:
    """The tokenizer of a base; symbols have the ids that follow its embeddings. In all else it is the base's."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, symbols: Sequence[str], first_id: int) -> None:
        self._tokenizer, self._symbols, self._first_id = tokenizer, tuple(symbols), first_id
        longest_first = sorted(symbols, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        self._id_of = {symbol: first_id + n for n, symbol in enumerate(symbols)}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: str, *more: Any, **options: Any) -> Any:
        """Token ids of one text. Where it holds symbols, more arguments are ignored and no special tokens are added."""
        pieces = self._split.split(text)
        if len(pieces) == 1:
            return self._tokenizer(text, *more, **options)
        ids: list[int] = []
        for piece in filter(None, pieces):
            known = self._id_of.get(piece)
            ids += [known] if known is not None else self._tokenizer(piece, add_special_tokens=False)["input_ids"]
        return {"input_ids": ids}

    def decode(self, ids: Any, **options: Any) -> str:
        """The text of token ids, symbols among them."""
        text, own = "", []
        for token in [ids] if isinstance(ids, int) else list(map(int, ids)):
            if token < self._first_id:
                own.append(token)
                continue
            text += self._own(own, options) + self._symbols[token - self._first_id]
            own = []
        return text + self._own(own, options)

    def _own(self, ids: list[int], options: dict[str, Any]) -> str:
        return str(self._tokenizer.decode(ids, **options)) if ids else ""
