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

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from antefix.attention.forest import Forest, forest_of, is_forest
from antefix.attention.hook import HookedModel, put_slots
from antefix.attention.partial import KeySet, Mask
from antefix.errors import BaseModelError, PrefixError
from antefix.methods.base import MethodModule
from antefix.parts.key_value import KeyValue
from antefix.prefix import Prefix
from antefix.sites import Site, find_sites

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
        # Learned positions end; an index beyond them is an error without a name, on a GPU a crash.
        longest = getattr(model.config, "max_position_embeddings", None)
        self._last_position = longest - 1 if longest and sites.positions == "absolute" else None
        self._live: list[dict[str, KeyValue]] | None = None
        with torch.no_grad():
            slots = self._made_slots()
        for site in sites.attention:
            for module_slots in slots:
                _check_fits(site, module_slots.get(site.name))
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
            # Whatever is called first (the model, its encoder alone) opens a forward pass with fresh slots.
            for module in self._model.modules():
                if isinstance(module, PreTrainedModel):
                    self._handles.append(module.register_forward_pre_hook(self._enter))
                    self._handles.append(module.register_forward_hook(self._leave, always_call=True))
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

    def _enter(self, module: nn.Module, args: Any) -> None:
        # A module that is entered again was left by an interrupt, which calls no hook.
        if self._outermost in (None, module):
            self._outermost = module
            # Made now, not at the first site: layers that recompute in the backward pass then find the same tensors.
            self._live = self._made_slots()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._outermost is module:
            self._outermost = None

    def _place_tokens(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Tokens of a row with a shifted prefix stand P further on; padding on the left takes no positions.

        A rotary base alone may count padding, since nothing there has a place of its own; slots have.
        """
        as_they_are = kwargs.get("position_ids") is not None or not _padded_on_the_left(kwargs)
        if not any(self._shifts) and (as_they_are or self._shared_index == BARE):
            return args, kwargs
        ids = kwargs.get("input_ids") if not args else args[0]
        if ids is None:
            ids = kwargs["inputs_embeds"]
        num_rows, length = ids.shape[:2]
        shifts = torch.tensor([*self._shifts, 0], device=ids.device)  # the last one serves index -1
        forest = _forest_in(kwargs)
        if forest is None:
            shift = shifts[self.rows_of(num_rows)].expand(num_rows)[:, None]
        else:
            shift = shifts[self.rows_of(forest.num_trees)].expand(forest.num_trees)[forest.tree_of_token]
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = _counted_positions(kwargs, length, ids.device)
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
        sets = self._gather(num_rows)
        if not self._attachment.trainable:
            self._kept = (num_rows, sets)
        return sets

    def _gather(self, num_rows: int) -> list[KeySet]:
        index = self._attachment.rows_of(num_rows)
        every = self._attachment.slots_of(self._site)
        if isinstance(index, int):
            slots = None if index == BARE else every[index]
            return [] if slots is None else [KeySet(slots.key_GPD[None], slots.value_GPE[None])]
        return _stacked(every, index)


def _stacked(every: list[KeyValue | None], index_B: Tensor) -> list[KeySet]:
    """Slots of different lengths side by side, row by row, with a mask over what a row does not have."""
    used_U, place_B = torch.unique(index_B, return_inverse=True)
    slots_U = [None if n == BARE else every[n] for n in used_U.tolist()]
    some = next((s for s in slots_U if s is not None), None)
    if some is None:
        return []
    counts_U = torch.tensor([0 if s is None else s.key_GPD.shape[1] for s in slots_U], device=index_B.device)
    longest = int(counts_U.max())
    key, value = (
        torch.stack([_padded(None if s is None else s[part], some[part], longest) for s in slots_U])[place_B]
        for part in (0, 1)
    )
    visible_B11P = (torch.arange(longest, device=index_B.device) < counts_U[place_B][:, None])[:, None, None]
    return [KeySet(key, value, None if bool(visible_B11P.all()) else Mask.of(visible_B11P, key.dtype))]


def _check_fits(site: Site, slots: KeyValue | None) -> None:
    """A module made for another base would fail deep inside, or worse, broadcast."""
    if slots is None:
        return
    G, D, E = site.num_key_value_heads, site.key_width, site.value_width
    (g, p, d), (g2, p2, e) = slots.key_GPD.shape, slots.value_GPE.shape
    if (g, d, g2, p2, e) != (G, D, G, p, E):
        raise PrefixError(
            f"the prefix has slots for {g} key/value heads of width {d} at {site.name}, this base has {G} of width "
            f"{D}: load the base it was trained on"
        )


def _padded(slots_GPD: Tensor | None, like_GPD: Tensor, longest: int) -> Tensor:
    if slots_GPD is None:
        return like_GPD.new_zeros(like_GPD.shape[0], longest, like_GPD.shape[2])
    return nn.functional.pad(slots_GPD, (0, 0, 0, longest - slots_GPD.shape[1]))


def _forest_in(kwargs: dict[str, Any]) -> Forest | None:
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Mapping):  # one for each kind of layer, all of the same trees
        mask = next(iter(mask.values()))
    return forest_of(mask) if isinstance(mask, Tensor) and is_forest(mask) else None


def _padded_on_the_left(kwargs: dict[str, Any]) -> bool:
    mask = kwargs.get("attention_mask")
    return isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask[:, 0].all())


def _counted_positions(kwargs: dict[str, Any], length: int, device: torch.device) -> Tensor:
    """Positions as generation counts them: from the mask where there is one, else after what is cached."""
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    cache = kwargs.get("past_key_values")
    past = 0 if cache is None else int(cache.get_seq_length())
    return torch.arange(past, past + length, device=device)[None]
