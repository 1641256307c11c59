"""What all attached prefixes have at one site, ready for any batch.

Axes: B rows, T queries, P slots, H query heads, G key/value heads, D key width, E value width, C width of hidden
states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from antefix.at_work import BARE, AtWork
from antefix.attention.branch import Acting, Call, Subset
from antefix.attention.forest import Forest
from antefix.attention.hook import is_bare, put_at_site
from antefix.attention.partial import KeySet, Partial, Scores
from antefix.encoder_rows import RowsAtWork
from antefix.errors import PrefixError
from antefix.hooks import take_off
from antefix.sites import Site
from antefix.stacking import stacked

RowMemory = Mapping[tuple[str, int, str], Tensor]
"""What branches keep of the beginning of one row's text: by site, place among the prefix's branches there, and name."""


class SiteStack:
    """The slots and branches of all attached prefixes at one site."""

    def __init__(
        self,
        attachment: AtWork,
        site: Site,
        *,
        has_branches: bool,
        needs_hidden_states: bool,
        rows: RowsAtWork | None,
    ) -> None:
        self._attachment = attachment
        self._site = site
        self._rows = rows
        self._has_branches = has_branches
        self._needs_hidden_states = needs_hidden_states
        self._kept: tuple[int, list[KeySet]] | None = None
        self._memories: dict[tuple[int, int], dict[str, Tensor]] = {}
        self._hidden: Tensor | None = None
        self._residual: Tensor | None = None
        self._handles: list[RemovableHandle] = []

    def install(self, modules: Mapping[str, nn.Module]) -> None:
        """Be asked by the site's attention. modules: the model's, by path."""
        put_at_site(modules[self._site.module], self)
        if self._needs_hidden_states:
            layer = modules[self._site.layer_module]
            self._handles.append(layer.register_forward_pre_hook(self._keep_hidden, with_kwargs=True))
        if self._has_branches and self._site.output_projection is not None:
            projection = modules[self._site.output_projection]
            self._handles.append(projection.register_forward_hook(self._add_residual))

    def uninstall(self, modules: Mapping[str, nn.Module]) -> None:
        """Be asked no more."""
        put_at_site(modules[self._site.module], None)
        take_off(self._handles)
        self._hidden = self._residual = None
        self._memories.clear()
        self.forget()

    def forget(self) -> None:
        """Slots or rows changed: gather anew."""
        self._kept = None

    def seen(self, mask: Tensor | None, query: Tensor) -> Tensor | None:
        """The mask as queries need it: with rows that stand before the texts, if there are some."""
        return mask if self._rows is None else self._rows.seen(mask, query)

    def key_sets(self, num_rows: int) -> list[KeySet]:
        """The slots for so many rows: one key set of B (or 1, where all rows share it) rows."""
        if self._kept is not None and self._kept[0] == num_rows:
            return self._kept[1]
        self._attachment.passes.look()
        sets = self._gather(num_rows)
        if not self._attachment.trainable:
            self._kept = (num_rows, sets)
        return sets

    def is_target(self, num_queries: int) -> Tensor | None:
        """Which queries are a target's, (B or 1, T); None for all. Raises PrefixError where that is not known."""
        is_target = self._attachment.is_target()
        if is_target is not None and is_target.shape[1] != num_queries:
            raise PrefixError(f"the batch has {is_target.shape[1]} tokens a row, attention has {num_queries} queries")
        return is_target

    def acting(self, num_rows: int, forest: Forest | None) -> Sequence[Acting]:
        """The branches of these rows, or of a forest's trees."""
        if not self._has_branches:
            return ()
        self._attachment.passes.look()
        index = self._attachment.rows_of(num_rows)
        every = [made.branches.get(self._site.name, ()) for made in self._attachment.made()]
        if isinstance(index, int):
            chosen = () if index == BARE else every[index]
            return [Acting(b, None, self._memory_of(index, n)) for n, b in enumerate(chosen)]
        used = set(index.tolist())
        of_query = index if forest is None else index[forest.tree_of_token]
        acting = []
        for n, branches in enumerate(every):
            if branches and n in used:
                subset = Subset((of_query == n).nonzero().flatten(), forest is not None)
                acting += [Acting(b, subset, self._memory_of(n, place), place) for place, b in enumerate(branches)]
        return acting

    def call(self, query: Tensor, scores: Scores, tokens: Callable[[], Partial], memory: dict[str, Tensor]) -> Call:
        """What a branch is asked with."""
        return Call(
            query_BHTD=query,
            scores=scores,
            tokens=tokens,
            places=lambda: self._attachment.places(self._site.kind, query),
            hidden=self._hidden_states,
            condition=lambda: self._attachment.condition_of(query.shape[0]),
            memory=memory,
        )

    def keep_residual(self, residual_BTC: Tensor | None) -> None:
        """What is added after the output projection of this call."""
        if residual_BTC is not None and self._site.output_projection is None:
            raise PrefixError(f"{self._site.name} of this base has no output projection that could be found")
        self._residual = residual_BTC

    def memory_of_row(self, row: int, index: int) -> dict[tuple[str, int, str], Tensor]:
        """What the branches of this prefix keep of the text in a row of the last pass."""
        return {
            (self._site.name, place, name): kept[row]
            for (of_prefix, place), memory in self._memories.items()
            if of_prefix == index
            for name, kept in memory.items()
        }

    def put_memories(self, rows: Sequence[tuple[int, RowMemory]]) -> None:
        """What branches keep is from here on that of these rows: each with its prefix's index."""
        self._memories.clear()
        found: dict[tuple[int, int, str], dict[int, Tensor]] = {}
        for row, (index, memory) in enumerate(rows):
            for (site, place, name), kept in memory.items():
                if site == self._site.name:
                    found.setdefault((index, place, name), {})[row] = kept
        for (index, place, name), of_row in found.items():
            nothing = torch.zeros_like(next(iter(of_row.values())))
            every = torch.stack([of_row.get(row, nothing) for row in range(len(rows))])
            self._memory_of(index, place)[name] = every

    def _memory_of(self, index: int, place: int) -> dict[str, Tensor]:
        return self._memories.setdefault((index, place), {})

    def _hidden_states(self) -> Tensor:
        assert self._hidden is not None, "asked for by a branch that does not say so"
        return self._hidden

    def _keep_hidden(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not is_bare():
            self._hidden = args[0] if args else kwargs["hidden_states"]

    def _add_residual(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        residual, self._residual = self._residual, None
        return output if residual is None else output + residual.to(output.dtype).view(output.shape)

    def _gather(self, num_rows: int) -> list[KeySet]:
        attachment = self._attachment
        index = attachment.rows_of(num_rows)
        every = [made.slots.get(self._site.name) for made in attachment.made()]
        if isinstance(index, int):
            slots = None if index == BARE else every[index]
            if slots is None:
                return []
            return [KeySet(slots.key_GPD[None], slots.value_GPE[None], for_targets=attachment.is_for_targets(index))]
        of_role = [
            [s if attachment.is_for_targets(n) == for_targets else None for n, s in enumerate(every)]
            for for_targets in (False, True)
        ]
        seen_by_all, seen_by_targets = (stacked(some, index) for some in of_role)
        return [*seen_by_all, *(s._replace(for_targets=True) for s in seen_by_targets)]
