"""New tokens of attached prefixes at work: read where embeddings are looked up, scored where words are.

Axes: B rows, T tokens, S new tokens, C width of embeddings, V words of the base, U prefixes in use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from antefix.at_work import BARE, AtWork
from antefix.attention.hook import is_bare
from antefix.errors import PrefixError
from antefix.hooks import take_off


class NewTokens:
    """The new tokens of all attached prefixes."""

    def __init__(self, attachment: AtWork, model: PreTrainedModel, *, are_scored: bool) -> None:
        """are_scored: whether they can be written; else they are only read, as by an encoder."""
        self._attachment = attachment
        self._embeddings: Any = model.get_input_embeddings()
        self._head: Any = model.get_output_embeddings() if are_scored else None  # type: ignore[no-untyped-call]
        self._model = model
        self._ids: Tensor | None = None
        self._absent: Tensor | None = None
        self._handles: list[RemovableHandle] = []

    def install(self, modules: Mapping[str, nn.Module]) -> None:
        """Go to work."""
        self._handles = [
            self._embeddings.register_forward_pre_hook(self._keep_ids),
            self._embeddings.register_forward_hook(self._read),
        ]
        if self._head is not None:
            self._handles.append(self._head.register_forward_hook(self._score))
            self._handles.append(self._model.register_forward_hook(self._rule_out))

    def uninstall(self, modules: Mapping[str, nn.Module]) -> None:
        """Rest."""
        take_off(self._handles)
        self._ids = self._absent = None

    def forget(self) -> None:
        """Nothing is gathered here."""

    def _every(self) -> list[Tensor | None]:
        return [made.new_tokens for made in self._attachment.made()]

    def _keep_ids(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if is_bare():
            return None
        self._ids = args[0]
        return (torch.where(args[0] < self._num_words, args[0], 0), *args[1:])

    @property
    def _num_words(self) -> int:
        return int(self._embeddings.weight.shape[0])

    def _read(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        ids, self._ids = self._ids, None
        if ids is None or not bool((is_new := ids >= self._num_words).any()):
            return output
        index, every = self._attachment.index_of_tokens(ids.shape[0]), self._every()
        of_token = torch.full_like(ids, index) if isinstance(index, int) else index.expand_as(ids)
        counts = torch.tensor([*(0 if t is None else len(t) for t in every), 0], device=ids.device)
        number = ids - self._num_words
        if bool((is_new & (number >= counts[of_token])).any()):
            raise PrefixError("a row holds a new token that its prefix does not have")
        starts = counts.cumsum(0) - counts
        table = torch.cat([t for t in every if t is not None]) * getattr(self._embeddings, "embed_scale", 1.0)
        rows = table[torch.where(is_new, starts[of_token] + number, 0)]
        return torch.where(is_new[..., None], rows.to(output.dtype), output)

    def _score(self, module: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Tensor:
        if is_bare():
            return logits
        every = self._every()
        states = args[0].to(torch.float32)
        index = 0 if states.ndim == 2 and len(every) == 1 else self._attachment.index_of_tokens(states.shape[0])
        if isinstance(index, int):
            new = None if index == BARE else every[index]
            return logits if new is None else torch.cat([logits, (states @ new.T).to(logits.dtype)], dim=-1)
        if states.ndim == 2 or self._attachment.forest is not None:
            raise PrefixError("rows of unlike new tokens are not scored packed: give them one after the other")
        return torch.cat([logits, self._of_rows(states, every, index[:, 0]).to(logits.dtype)], dim=-1)

    def _rule_out(self, module: nn.Module, args: Any, output: Any) -> None:
        """What a row does not have is never likely, whatever the model does with logits (a soft cap)."""
        absent_BS, self._absent = self._absent, None
        if absent_BS is not None:
            output.logits[..., -absent_BS.shape[1] :].masked_fill_(absent_BS[:, None], -torch.inf)

    def _of_rows(self, states_BTC: Tensor, every: Sequence[Tensor | None], index_B: Tensor) -> Tensor:
        """(B, T, S)."""
        longest = max(len(t) for t in every if t is not None)
        some = next(t for t in every if t is not None)
        nothing = some.new_zeros(0, some.shape[1])
        tables = [nothing if t is None else t for t in (*every, None)]  # the last one serves index -1
        counts = torch.tensor([len(t) for t in tables], device=index_B.device)
        stacked_USC = torch.stack([pad(t, (0, 0, 0, longest - len(t))) for t in tables])
        scores = torch.einsum("btc,bsc->bts", states_BTC, stacked_USC[index_B])
        self._absent = torch.arange(longest, device=index_B.device) >= counts[index_B][:, None]
        return scores
