"""Prefixes + base -> an attached base: an ordinary transformers model whose rows carry prefixes.

    with attached(model, prefix):                         # every row carries the prefix
        model.generate(**batch)
    with attached(model, menus, sport) as attachment:
        attachment.rows = [0, 1, -1]                      # each row its own, the third none; beams expand it
        model(**batch)

No method of the model is replaced. While a *trainable* prefix is attached it stands in the model as the
submodule `antefix`, so that any training loop finds its parameters. After detaching the base is bit-equal to
what it was.

Axes: N attached prefixes, B rows, P slots, G key/value heads, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from antefix.attention.hook import HookedModel, put_slots
from antefix.attention.partial import KeySet
from antefix.errors import BaseModelError, PrefixError
from antefix.forward_call import counted_positions, forest_in, padded_on_the_left, targets_in, tokens_of
from antefix.methods.base import MethodModule
from antefix.parts.key_value import KeyValue
from antefix.passes import Passes
from antefix.prefix import Prefix
from antefix.sites import find_sites
from antefix.stacking import check_fits, stacked

BARE = -1
"""The row index of a row without a prefix."""

_SUBMODULE = "antefix"
_STACK_ATTRIBUTE = "antefix_attachments"


def attach(
    model: PreTrainedModel, *prefixes: Prefix | MethodModule, rows: Sequence[int] | Tensor | None = None
) -> Attachment:
    """Attach prefixes to a base's model until `.detach()` is called.

    A second attach takes over from the first until it is detached. Raises WrongBaseError for a prefix of
    another base and PrefixError for one that does not fit.
    """
    modules = [p.module(model) if isinstance(p, Prefix) else p for p in prefixes]
    attachment = Attachment(model, modules, prefixes)
    attachment.rows = rows
    stack = _stack(model)
    if stack:
        stack[-1]._uninstall()
    try:
        attachment._install()
    except BaseModelError:
        if stack:
            stack[-1]._install()
        raise
    stack.append(attachment)
    return attachment


@contextmanager
def attached(
    model: PreTrainedModel, *prefixes: Prefix | MethodModule, rows: Sequence[int] | Tensor | None = None
) -> Iterator[Attachment]:
    """`attach` for the length of a block, exceptions included."""
    attachment = attach(model, *prefixes, rows=rows)
    try:
        yield attachment
    finally:
        attachment.detach()


def current_attachment(model: nn.Module) -> Attachment | None:
    """What is attached to a model right now."""
    stack: list[Attachment] = model.__dict__.get(_STACK_ATTRIBUTE, [])
    return stack[-1] if stack else None


@contextmanager
def sources_end(model: nn.Module, lengths: int | Tensor | None) -> Iterator[None]:
    """For the length of a block what is attached to a model knows where the sources end (None: from elsewhere)."""
    attachment = current_attachment(model)
    if attachment is None:
        yield
        return
    before = attachment.source_lengths
    attachment.source_lengths = lengths
    try:
        yield
    finally:
        attachment.source_lengths = before


def _stack(model: nn.Module) -> list[Attachment]:
    """What is attached to a model, the latest last. It lives in the model, so that it dies with it."""
    stack: list[Attachment] = model.__dict__.setdefault(_STACK_ATTRIBUTE, [])
    return stack


class Attachment:
    """Prefixes at work in a model. Made by `attach`."""

    def __init__(
        self,
        model: PreTrainedModel,
        modules: Sequence[MethodModule],
        prefixes: Sequence[Prefix | MethodModule],
    ) -> None:
        if not modules:
            raise PrefixError("nothing to attach: give at least one prefix")
        sites = find_sites(model)
        self.prefixes = tuple(prefixes)
        self._model = model
        self._modules = modules
        self._rows: Tensor | None = None
        self._shared_index: int | None = 0 if len(modules) == 1 else None
        self._trainable = any(p.requires_grad for m in modules for p in m.parameters())
        self._shifts = [m.num_virtual_tokens if m.positions == "shifted" else 0 for m in modules]
        if any(self._shifts) and sites.positions == "none":
            raise PrefixError(
                "a prefix with shifted positions needs a base that takes position_ids and counts them from 0"
            )
        self._relative = sites.positions == "relative"
        # The decoder of an encoder-decoder reads targets and nothing else.
        self._for_targets = [m.for_targets and not sites.is_encoder_decoder for m in modules]
        self._source_lengths: Tensor | None = None
        self._is_target: Tensor | None = None
        self._knows_targets = False
        self.passes = Passes()
        # Learned positions end; an index beyond them is an error without a name, on a GPU a crash.
        longest = getattr(model.config, "max_position_embeddings", None)
        self._last_position = longest - 1 if longest and sites.positions == "absolute" else None
        self._live: list[dict[str, KeyValue]] | None = None
        with torch.no_grad():
            slots = self._made_slots()
        for site in sites.attention:
            for module_slots in slots:
                check_fits(site, module_slots.get(site.name))
        names = dict(model.named_modules())
        self._at_site = {
            names[site.module]: SiteStack(self, site.name)
            for site in sites.attention
            if any(site.name in module_slots for module_slots in slots)
        }
        self._hooked = HookedModel(model)
        self._undo_routing: list[tuple[Any, str]] = []
        self._handles: list[RemovableHandle] = []
        # The module whose forward pass is the outermost one running, None between passes.
        self._outermost: nn.Module | None = None

    @property
    def rows(self) -> Tensor | None:
        """Which prefix each row of a batch carries: an index into the attached ones, -1 for none.

        None means the only one attached, for every row. A batch of k times as many rows (beams) repeats
        every entry k times.
        """
        return self._rows

    @rows.setter
    def rows(self, rows: Sequence[int] | Tensor | None) -> None:
        self._shared_index = 0 if rows is None and len(self._modules) == 1 else None
        if rows is not None:
            rows = torch.as_tensor(rows, dtype=torch.long, device=self._model.device).reshape(-1)
            if len(rows) == 0 or int(rows.min()) < BARE or int(rows.max()) >= len(self._modules):
                last = len(self._modules) - 1
                raise PrefixError(f"rows must be indices from {BARE} (none) to {last}, one a row; got {rows.tolist()}")
            if bool((rows == rows[0]).all()):
                self._shared_index = int(rows[0])
        self._rows = rows
        self._forget_gathered()

    @property
    def source_lengths(self) -> Tensor | None:
        """Where the sources end, for prefixes that targets alone see: columns of source, padding before it included.

        One number for all rows or one a row, repeated for beams as `rows` is. A source's last token is the first that
        sees such a prefix, since it predicts the first token of the target. None: as the `labels` of a batch say, where
        it has some. `antefix.generate` and training set it; before a `generate` of the model's own set it to the
        width of the prompts.
        """
        return self._source_lengths

    @source_lengths.setter
    def source_lengths(self, lengths: int | Sequence[int] | Tensor | None) -> None:
        if lengths is not None:
            lengths = torch.as_tensor(lengths, dtype=torch.long, device=self._model.device).reshape(-1)
        self._source_lengths = lengths

    def rows_of(self, num_rows: int) -> Tensor | int:
        """The index of every row of a batch, or one index if all rows share it."""
        if self._rows is None:
            if self._shared_index is None:
                raise PrefixError(f"{len(self._modules)} prefixes are attached: say which row carries which (.rows)")
            return self._shared_index
        if num_rows % len(self._rows):
            raise PrefixError(f"the batch has {num_rows} rows, attachment.rows has {len(self._rows)}")
        if self._shared_index is not None:
            return self._shared_index
        return self._rows.repeat_interleave(num_rows // len(self._rows))

    def is_target(self) -> Tensor | None:
        """Which queries of the running forward pass are a target's: (B or 1, T), None for all. Raises PrefixError."""
        if not self._knows_targets:
            raise PrefixError(
                "a prefix that targets alone see must be told where the sources end: give `labels`, or set "
                "attachment.source_lengths to the number of source columns (for `generate`: the width of the prompts)"
            )
        return self._is_target

    def is_for_targets(self, index: int) -> bool:
        """Whether targets alone see this attached prefix."""
        return self._for_targets[index]

    def slots_of(self, site: str) -> list[KeyValue | None]:
        """The slots every attached prefix has at a site."""
        if self._live is None:
            self._live = self._made_slots()
        return [slots.get(site) for slots in self._live]

    def _made_slots(self) -> list[dict[str, KeyValue]]:
        device = self._model.device
        return [
            {site: KeyValue(*(t.to(device) for t in slots)) for site, slots in m.slots().items()} for m in self._modules
        ]

    @property
    def longest_shift(self) -> int:
        """How many positions shifted prefixes take from the context at most."""
        return max(self._shifts)

    @property
    def trainable(self) -> bool:
        """Whether slots change between forward passes."""
        return self._trainable

    def detach(self) -> None:
        """Take the prefixes off; what was attached before is at work again. Twice is once."""
        stack = _stack(self._model)
        if self not in stack:
            return
        stack[-1]._uninstall()
        stack.remove(self)
        if stack:
            stack[-1]._install()
        else:
            del self._model.__dict__[_STACK_ATTRIBUTE]

    def _install(self) -> None:
        self._undo_routing = self._hooked.route()
        for module, stack in self._at_site.items():
            put_slots(module, stack)
        if self._trainable:
            self._model.add_module(_SUBMODULE, nn.ModuleList(self._modules))
        if self._trainable or any(self._for_targets):
            # Whatever is called first (the model, its encoder alone) opens a forward pass.
            for module in self._model.modules():
                if isinstance(module, PreTrainedModel):
                    self._handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                    self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        self._handles.append(self._model.register_forward_pre_hook(self._check_routed))
        if any(self._shifts) or self._relative:
            self._handles.append(self._model.register_forward_pre_hook(self._place_tokens, with_kwargs=True))

    def _uninstall(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for module in self._at_site:
            put_slots(module, None)
        if self._trainable:
            delattr(self._model, _SUBMODULE)
        self._hooked.restore(self._undo_routing)
        self._outermost = None
        self._live = None
        self._forget_gathered()

    def _forget_gathered(self) -> None:
        for stack in self._at_site.values():
            stack.forget()

    def _enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        # A module that is entered again was left by an interrupt, which calls no hook.
        if self._outermost in (None, module):
            self._outermost = module
            # Made now, not at the first site: layers that recompute in the backward pass then find the same tensors.
            if self._trainable:
                self._live = self._made_slots()
            if any(self._for_targets):
                self._knows_targets, self._is_target = targets_in(args, kwargs, self._source_lengths)
            slots = [t for of_module in self._live or [] for pair in of_module.values() for t in pair]
            self.passes.enter([*slots, self._is_target], recomputes=self._model.is_activation_checkpointing)

    def _check_routed(self, module: nn.Module, args: Any) -> None:
        if not self._hooked.is_routed:
            raise PrefixError(
                "the model's attention implementation was changed while a prefix was attached, which takes the prefix "
                "off: detach it, and attach it again"
            )

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._outermost is module:
            self._outermost = None

    def _place_tokens(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Tokens of a row with a shifted prefix stand P further on; padding on the left takes no positions.

        A rotary base alone may count padding, since nothing there has a place of its own; slots have.
        """
        as_they_are = kwargs.get("position_ids") is not None or not padded_on_the_left(kwargs)
        if not any(self._shifts) and (as_they_are or self._shared_index == BARE):
            return args, kwargs
        ids = tokens_of(args, kwargs)
        num_rows, length = ids.shape[:2]
        shifts = torch.tensor([*self._shifts, 0], device=ids.device)  # the last one serves index -1
        forest = forest_in(kwargs)
        if forest is None:
            shift = shifts[self.rows_of(num_rows)].expand(num_rows)[:, None]
        else:
            shift = shifts[self.rows_of(forest.num_trees)].expand(forest.num_trees)[forest.tree_of_token]
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = counted_positions(kwargs, length, ids.device)
        positions = positions + shift
        if self._last_position is not None and (last := int(positions.max())) > self._last_position:
            raise PrefixError(
                f"a token would stand at position {last}, the base's last one is {self._last_position}: a prefix with "
                f"shifted positions takes up to {self.longest_shift} of them; shorten the text"
            )
        return args, {**kwargs, "position_ids": positions}


class SiteStack:
    """The slots of all attached prefixes at one site, ready for any batch."""

    def __init__(self, attachment: Attachment, site: str) -> None:
        self._attachment = attachment
        self._site = site
        self._kept: tuple[int, list[KeySet]] | None = None

    def forget(self) -> None:
        """Slots or rows changed: gather anew."""
        self._kept = None

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

    def _gather(self, num_rows: int) -> list[KeySet]:
        attachment = self._attachment
        index = attachment.rows_of(num_rows)
        every = attachment.slots_of(self._site)
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
