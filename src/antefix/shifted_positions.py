"""Where tokens stand beside slots that take positions.

Tokens of a row with a shifted prefix stand P further on; padding on the left takes no positions. A rotary base without
slots may count padding, since only distances matter to it; distances to slots would change with the padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from antefix.at_work import BARE, AtWork
from antefix.attention.hook import is_bare
from antefix.base import context_length
from antefix.errors import PrefixError
from antefix.forward_call import counted_positions, forest_in, padded_on_the_left, tokens_of
from antefix.methods.base import MethodModule
from antefix.sites import Sites


class ShiftedPositions:
    """The shifts of all attached prefixes."""

    def __init__(
        self, attachment: AtWork, model: PreTrainedModel, sites: Sites, modules: Sequence[MethodModule]
    ) -> None:
        """Raises PrefixError where a prefix is shifted and the base takes no positions."""
        self._attachment, self._model = attachment, model
        self._shifts = [m.num_virtual_tokens if m.positions == "shifted" else 0 for m in modules]
        if any(self._shifts) and sites.positions == "none":
            raise PrefixError(
                "a prefix with shifted positions needs a base that takes position_ids and counts them from 0"
            )
        self._is_needed = any(self._shifts) or sites.positions == "relative"
        # Learned positions end; an index beyond them is an error without a name, on a GPU a crash.
        longest = context_length(model.config)
        self._last_position = longest - 1 if longest and sites.positions == "absolute" else None
        self._handle: RemovableHandle | None = None

    @property
    def longest(self) -> int:
        """How many positions shifted prefixes take from the context at most."""
        return max(self._shifts)

    def install(self, modules: Mapping[str, nn.Module]) -> None:
        """Go to work."""
        if self._is_needed:
            self._handle = self._model.register_forward_pre_hook(self._place_tokens, with_kwargs=True)

    def uninstall(self, modules: Mapping[str, nn.Module]) -> None:
        """Rest."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def forget(self) -> None:
        """Nothing is gathered here."""

    def _place_tokens(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        as_they_are = kwargs.get("position_ids") is not None or not padded_on_the_left(kwargs)
        if is_bare() or (not any(self._shifts) and (as_they_are or self._attachment.shared_index == BARE)):
            return args, kwargs
        ids = tokens_of(args, kwargs)
        num_rows, length = ids.shape[:2]
        shifts = torch.tensor([*self._shifts, 0], device=ids.device)  # the last one serves index -1
        forest = forest_in(kwargs)
        if forest is None:
            shift = shifts[self._attachment.rows_of(num_rows)].expand(num_rows)[:, None]
        else:
            shift = shifts[self._attachment.rows_of(forest.num_trees)].expand(forest.num_trees)[forest.tree_of_token]
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = counted_positions(kwargs, length, ids.device)
        positions = positions + shift
        if self._last_position is not None and (last := int(positions.max())) > self._last_position:
            raise PrefixError(
                f"a token would stand at position {last}, the base's last one is {self._last_position}: a prefix with "
                f"shifted positions takes up to {self.longest} of them; shorten the text"
            )
        return args, {**kwargs, "position_ids": positions}
