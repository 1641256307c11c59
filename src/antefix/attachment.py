"""Prefixes at work in a model: which row carries which, and what a forward pass must know of it.

`antefix.attach` makes attachments; what they have at a site is a `SiteStack`.

Axes: B rows, P tokens of a second text, C width of hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from antefix.at_work import BARE, Made, Stack
from antefix.attention.branch import Condition, Places
from antefix.attention.forest import Forest
from antefix.attention.hook import HookedModel, is_bare
from antefix.encoder_rows import RowsAtWork
from antefix.errors import PrefixError
from antefix.forward_call import (
    decoder_places,
    encoder_places,
    forest_in,
    forest_places,
    num_cached,
    real_tokens,
    target_begins,
    targets_in,
    text_places,
    tokens_of,
)
from antefix.hooks import take_off
from antefix.inserted_tokens import InsertedTokens
from antefix.linear_stack import linear_stacks
from antefix.methods.base import MethodModule
from antefix.new_tokens import NewTokens
from antefix.parts.word_head import Head
from antefix.passes import Passes
from antefix.prefix import Prefix
from antefix.shifted_positions import ShiftedPositions
from antefix.site_stack import SiteStack
from antefix.sites import Kind, find_sites
from antefix.stacking import check_fits
from antefix.weights_at_work import WeightsAtWork

_SUBMODULE = "antefix"
_STACK_ATTRIBUTE = "antefix_attachments"
_NOTHING = MethodModule()
_WEIGHTS_FOR_ALL = "a prefix of the base's own weights is the same for all rows of a batch"


def attachments(model: nn.Module) -> list[Attachment]:
    """What is attached to a model, the latest last. It lives in the model, so that it dies with it."""
    stack: list[Attachment] = model.__dict__.setdefault(_STACK_ATTRIBUTE, [])
    return stack


class Attachment:
    """Prefixes at work in a model. Made by `antefix.attach`."""

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
        self._shifted = ShiftedPositions(self, model, sites, modules)
        self._sites = sites
        # The decoder of an encoder-decoder reads targets and nothing else.
        self._for_targets = [m.for_targets and not sites.is_encoder_decoder for m in modules]
        self._source_lengths: Tensor | None = None
        self._target_begins: Tensor | None = None
        self._is_target: Tensor | None = None
        self.condition: Condition | None = None
        """The rows' second texts (see `antefix.condition`), repeated for beams as `rows` is; None: there are none."""
        self._given: tuple[Any, dict[str, Any]] = ((), {})
        self._recomputes = False
        self._real: Tensor | None = None
        self._past = 0  # of the cache at the pass's beginning: layers make it longer
        self._places: dict[Kind, Places] = {}
        self.passes = Passes()
        self._live: list[Made] | None = None
        device = model.device
        for module in modules:  # moving one that is there already takes longer than asking
            if any(tensor.device != device for tensor in (*module.parameters(), *module.buffers())):
                module.to(device)
        with torch.no_grad():
            made = self._make()
        for of_module in made:
            check_fits(sites.attention, of_module.slots)
        self._acts_in_passes = any(m.branches or m.linear or m.inserted or m.new_tokens is not None for m in made)
        reads_sources = "self" in sites.kinds and not sites.is_encoder_decoder
        self._tells_targets = reads_sources and any(m.for_targets or m.needs_places for m in modules)
        self._rows_at_work = RowsAtWork(model, sites, self) if any(m.rows is not None for m in made) else None
        self._stacks = self._stacked(made)
        self._hooked = HookedModel(model)
        self._undo_routing: list[tuple[Any, str]] = []
        self._handles: list[RemovableHandle] = []
        # The module whose forward pass is the outermost one running, None between passes.
        self._outermost: nn.Module | None = None

    def _stacked(self, made: Sequence[Made]) -> list[Stack]:
        """Where these prefixes act."""
        found: list[Stack] = [self._shifted, *([] if self._rows_at_work is None else [self._rows_at_work])]
        for site in self._sites.attention:
            branches = [b for m in made for b in m.branches.get(site.name, ())]
            rows = self._rows_at_work if site.kind == "encoder_self" else None
            if branches or rows or any(site.name in m.slots for m in made):
                hidden = any(b.needs_hidden_states for b in branches)
                stack = SiteStack(self, site, has_branches=bool(branches), needs_hidden_states=hidden, rows=rows)
                found.append(stack)
        if any(m.new_tokens is not None for m in made):  # before what acts on embeddings
            found.append(NewTokens(self, self._model, are_scored=self._sites.is_causal))
        found += linear_stacks(self, self._sites, [m.linear for m in made])
        if any(m.inserted is not None for m in made):
            found.append(InsertedTokens(self, self._model, [m.inserted for m in made]))
        if any(not m.acts_on_rows for m in self._modules):
            if len(self._modules) > 1:
                raise PrefixError(f"{_WEIGHTS_FOR_ALL}: attach it alone")
            found.append(WeightsAtWork(self._model, self._modules[0].weights()))
        return found

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
            if self._shared_index != 0 and not all(m.acts_on_rows for m in self._modules):
                raise PrefixError(f"{_WEIGHTS_FOR_ALL}: leave attachment.rows alone")
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

    @property
    def shared_index(self) -> int | None:
        """The index that all rows have; None: they differ."""
        return self._shared_index

    def condition_of(self, num_rows: int) -> Condition:
        """The second texts of a batch's rows. Raises PrefixError."""
        if self.condition is None:
            raise PrefixError("what is attached needs a second text for every row: set attachment.condition")
        count = len(self.condition.states_BPC)
        if num_rows % count:
            raise PrefixError(f"the batch has {num_rows} rows, attachment.condition has {count}")
        return self.condition.of_rows(num_rows)

    def index_of_tokens(self, num_rows: int) -> Tensor | int:
        """The index of every token, (B, 1), in a packed row (1, T); or one index if all rows share it."""
        forest = self.forest
        index = self.rows_of(num_rows if forest is None else forest.num_trees)
        if isinstance(index, int):
            return index
        return index[:, None] if forest is None else index[forest.tree_of_token][None]

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
        self._known_begins()
        return self._is_target

    def _known_begins(self) -> Tensor:
        if self._target_begins is None:
            raise PrefixError(
                "a prefix that tells targets from sources must be told where the sources end: give `labels`, or set "
                "attachment.source_lengths to the number of source columns (for `generate`: the width of the prompts)"
            )
        return self._target_begins

    def is_for_targets(self, index: int) -> bool:
        """Whether targets alone see this attached prefix."""
        return self._for_targets[index]

    @property
    def forest(self) -> Forest | None:
        """The packed rows of the running forward pass, if it has such."""
        return forest_in(self._given[1])

    @property
    def num_rows(self) -> int:
        """How many rows the running forward pass reads."""
        return len(tokens_of(*self._given))

    def places(self, kind: Kind, query: Tensor) -> Places:
        """Where the running pass's queries at sites of this kind stand. Raises PrefixError where nobody said it."""
        if kind not in self._places:
            self._places[kind] = self._found_places(kind, query)
        return self._places[kind]

    def _found_places(self, kind: Kind, query: Tensor) -> Places:
        args, kwargs = self._given
        if kind == "encoder_self":
            places = encoder_places(args, kwargs)
            return places if self._rows_at_work is None else self._rows_at_work.beside(places)
        if self._sites.is_encoder_decoder:
            return decoder_places(self._past, query.shape[0], query.shape[2], query.device)
        forest = forest_in(kwargs)
        if forest is not None:
            return forest_places(forest, kwargs)
        assert self._real is not None
        return text_places(self._real, self._past, self._known_begins())

    def made(self) -> list[Made]:
        """What every attached prefix is in the running forward pass."""
        if self._live is None:
            self._live = self._make()
        return self._live

    def _make(self, used: set[int] | None = None) -> list[Made]:
        return [Made.of(m) if used is None or n in used else Made.nothing() for n, m in enumerate(self._modules)]

    def head_of(self, index: int) -> Head:
        """What reads labels off the states of rows with this prefix. Raises PrefixError where it labels nothing."""
        head = self.module_of(index).head
        if head is None:
            raise PrefixError("a row's prefix has no head that labels: it was not trained to classify or to tag")
        return head

    @property
    def has_new_tokens(self) -> bool:
        """Whether more is scored than the base's own words."""
        return any(m.symbols for m in self._modules)

    def module_of(self, index: int) -> MethodModule:
        """The prefix of rows with this index, to be asked what it needs; of bare rows one that is nothing."""
        return _NOTHING if index == BARE else self._modules[index]

    @property
    def condition_length(self) -> int | None:
        """How many tokens a second text has at most; None: none is needed."""
        return max((m.condition_length for m in self._modules if m.condition_length is not None), default=None)

    @property
    def at_sites(self) -> list[SiteStack]:
        """What acts at attention sites, with what it keeps of every row's text."""
        return [stack for stack in self._stacks if isinstance(stack, SiteStack)]

    @property
    def trainable(self) -> bool:
        """Whether slots change between forward passes."""
        return self._trainable

    def begin(self) -> None:
        """Go to work, and let what was attached before rest.

        Raises BaseModelError and PrefixError; then everything is as it was.
        """
        stack = attachments(self._model)
        if stack:
            stack[-1]._uninstall()
        try:
            self._install()
        except BaseException:
            self._uninstall()
            if stack:
                stack[-1]._install()
            raise
        stack.append(self)

    def detach(self) -> None:
        """Take the prefixes off; what was attached before is at work again. Twice is once."""
        stack = attachments(self._model)
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
        modules = dict(self._model.named_modules())
        for stack in self._stacks:  # rows before sites, which keep what a layer is given with these rows in it
            stack.install(modules)
        if self._trainable:
            self._model.add_module(_SUBMODULE, nn.ModuleList(self._modules))
        if self._trainable or any(self._for_targets) or self._acts_in_passes:
            # Whatever is called first (the model, its encoder alone) opens a forward pass.
            for module in self._model.modules():
                if isinstance(module, PreTrainedModel):
                    self._handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                    self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        self._handles.append(self._model.register_forward_pre_hook(self._check_routed))

    def _uninstall(self) -> None:
        take_off(self._handles)
        modules = dict(self._model.named_modules())
        for stack in self._stacks:
            stack.uninstall(modules)
        if hasattr(self._model, _SUBMODULE) and self._trainable:
            delattr(self._model, _SUBMODULE)
        self._hooked.restore(self._undo_routing)
        self._outermost = None
        self._live = None
        self._given, self._real = ((), {}), None
        self._places.clear()

    def _forget_gathered(self) -> None:
        for stack in self._stacks:
            stack.forget()

    def _enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        # A module that is entered again was left by an interrupt, which calls no hook.
        if is_bare() or self._outermost not in (None, module):
            return
        self._outermost = module
        # Made now, not at the first site: layers that recompute in the backward pass then find the same tensors.
        if self._trainable:
            # Of hundreds of one method that are trained together a batch has a few; the others are nothing to it.
            rows = [] if self._rows is None or len({type(m) for m in self._modules}) > 1 else self._rows.tolist()
            self._live = self._make(set(rows) if any(n != BARE for n in rows) else None)
        if self._tells_targets:
            begins = self._target_begins = target_begins(args, kwargs, self._source_lengths)
            self._is_target = None if begins is None else targets_in(args, kwargs, begins)
            if forest_in(kwargs) is None:
                self._real = real_tokens(args, kwargs, num_cached(kwargs), self._real)
        self._given, self._past = (args, kwargs), num_cached(kwargs)
        self._places.clear()
        tensors = [t for made in self._live or [] for t in made.tensors()]
        left = [*tensors, self._is_target, *(self.condition or ())]
        self._recomputes = self._model.is_activation_checkpointing
        self.passes.enter(left, recomputes=self._recomputes)

    def _check_routed(self, module: nn.Module, args: Any) -> None:
        if not self._hooked.is_routed:
            raise PrefixError(
                "the model's attention implementation was changed while a prefix was attached, which takes the prefix "
                "off: detach it, and attach it again"
            )

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._outermost is module and not is_bare():
            self._outermost = None
            if not torch.is_grad_enabled() and not self._recomputes:  # else layers may be computed again
                self._given = (), {}  # a cache may be in it
