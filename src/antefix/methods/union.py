"""Several methods that act together on one base: `method = "prefix_tuning+prefix_memory"`.

Each has its own choices (`[config.prefix_tuning]`), tensors (`prefix_tuning.layers.0.self.key`) and learning rate: a
run's rate is that of the first, and the others' keep their ratio to it. Slots of several stand side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, ClassVar, Self

import torch
from pydantic import create_model
from torch import Tensor, nn

from antefix.attention.branch import Branch, Condition
from antefix.base import Base
from antefix.data.linearise import TextFormat
from antefix.errors import PrefixError, RecipeError
from antefix.methods import UNION, method_class
from antefix.methods.base import MethodConfig, MethodModule
from antefix.parts.initial import Positions
from antefix.parts.inserted import Inserted
from antefix.parts.key_value import KeyValue
from antefix.parts.linear import LinearPart, together
from antefix.parts.rows import EncoderRows
from antefix.sites import Sites


class UnionConfig(MethodConfig):
    """The choices of every member, under its name."""

    def completed(self, targets: Sequence[str]) -> Self:
        return self.model_copy(
            update={name: getattr(self, name).completed(targets) for name in type(self).model_fields}
        )

    @property
    def parent(self) -> str | None:
        parents = [getattr(self, name).parent for name in type(self).model_fields]
        return next((p for p in parents if p is not None), None)


class Union(MethodModule):
    """One prefix under several methods. `union_of` makes the class of a union."""

    members: ClassVar[tuple[str, ...]]

    def __init__(self, config: Any, modules: Sequence[MethodModule]) -> None:
        super().__init__()
        self.config = config
        self.modules_of = nn.ModuleList(modules)
        shifted = [m for m in self._modules_in_order if m.positions == "shifted"]
        if len(shifted) > 1:
            raise PrefixError(f"{UNION.join(self.members)}: several of these want to stand before the text; take one")
        if len({m.for_targets for m in self._modules_in_order if m.slots()}) > 1:
            raise PrefixError(f"{UNION.join(self.members)}: slots for targets alone and others do not go together")
        if sum(m.num_inserted_tokens > 0 for m in self._modules_in_order) > 1:
            raise PrefixError(f"{UNION.join(self.members)}: several of these stand after the source; take one")
        if sum(bool(m.symbols) for m in self._modules_in_order) > 1:
            raise PrefixError(f"{UNION.join(self.members)}: several of these have new tokens; take one")
        if sum(m.encoder_rows() is not None for m in self._modules_in_order) > 1:
            raise PrefixError(f"{UNION.join(self.members)}: several of these put rows before the text; take one")

    @classmethod
    def default_learning_rate(cls, config: Any) -> float:
        """That of the first."""
        return cls._rates(config)[0]

    @classmethod
    def build(cls, base: Base, config: Any) -> Self:
        return cls(config, [method_class(name).build(base, getattr(config, name)) for name in cls.members])

    @classmethod
    def restore(cls, sites: Sites, config: Any, tensors: Mapping[str, Tensor]) -> Self:
        of_member: dict[str, dict[str, Tensor]] = {name: {} for name in cls.members}
        for name, tensor in tensors.items():
            member, _, own = name.partition(".")
            if member not in of_member:
                raise PrefixError(f"tensor '{name}' belongs to none of {', '.join(cls.members)}")
            of_member[member][own] = tensor
        modules = [method_class(n).restore(sites, getattr(config, n), of_member[n]) for n in cls.members]
        return cls(config, modules).requires_grad_(False).eval()

    @property
    def positions(self) -> Positions:
        return "shifted" if any(m.positions == "shifted" for m in self._modules_in_order) else "in_place"

    @property
    def num_virtual_tokens(self) -> int:
        """Of the member that shifts positions; where none does, of the one with the most."""
        counts = [m.num_virtual_tokens for m in self._modules_in_order if m.positions == self.positions]
        return max(counts, default=0)

    @property
    def for_targets(self) -> bool:
        return any(m.for_targets for m in self._modules_in_order)

    @property
    def leaves_sources(self) -> bool:
        return all(m.leaves_sources for m in self._modules_in_order)

    @property
    def needs_places(self) -> bool:
        return any(m.needs_places for m in self._modules_in_order)

    @property
    def condition_length(self) -> int | None:
        lengths = [m.condition_length for m in self._modules_in_order if m.condition_length is not None]
        return max(lengths, default=None)

    def rate_scales(self) -> list[tuple[list[nn.Parameter], float]]:
        rates = self._rates(self.config)
        return [
            (parameters, scale * rate / rates[0])
            for module, rate in zip(self._modules_in_order, rates, strict=True)
            for parameters, scale in module.rate_scales()
        ]

    def auxiliary_loss(self, condition: Condition | None) -> Tensor | None:
        losses = [m.auxiliary_loss(condition) for m in self._modules_in_order]
        found = [loss for loss in losses if loss is not None]
        return torch.stack(found).sum() if found else None

    def slots(self) -> dict[str, KeyValue]:
        at: dict[str, list[KeyValue]] = {}
        for module in self._modules_in_order:
            for name, pair in module.slots().items():
                at.setdefault(name, []).append(pair)
        return {
            name: KeyValue(*(torch.cat(parts, dim=1) for parts in zip(*pairs, strict=True)))
            for name, pairs in at.items()
        }

    def branches(self) -> dict[str, Sequence[Branch]]:
        at: dict[str, list[Branch]] = {}
        for module in self._modules_in_order:
            for name, branches in module.branches().items():
                at.setdefault(name, []).extend(branches)
        return {name: tuple(branches) for name, branches in at.items()}

    def linear_parts(self) -> dict[str, LinearPart]:
        at: dict[str, list[LinearPart]] = {}
        for module in self._modules_in_order:
            for name, part in module.linear_parts().items():
                at.setdefault(name, []).append(part)
        return {name: together(parts) for name, parts in at.items()}

    def weights(self) -> dict[str, nn.Parameter]:
        every = [m.weights() for m in self._modules_in_order]
        if twice := {name for n, some in enumerate(every) for name in some if any(name in o for o in every[:n])}:
            raise PrefixError(f"{UNION.join(self.members)}: several of these train '{min(twice)}'; take one")
        return {name: weight for some in every for name, weight in some.items()}

    @property
    def symbols(self) -> tuple[str, ...]:
        return next((m.symbols for m in self._modules_in_order if m.symbols), ())

    def with_symbols(self, text_format: TextFormat) -> TextFormat:
        for module in self._modules_in_order:
            text_format = module.with_symbols(text_format)
        return text_format

    def new_tokens(self) -> Tensor | None:
        return next((made for m in self._modules_in_order if (made := m.new_tokens()) is not None), None)

    @property
    def num_inserted_tokens(self) -> int:
        return max(m.num_inserted_tokens for m in self._modules_in_order)

    def inserted(self) -> Inserted | None:
        return next((made for m in self._modules_in_order if (made := m.inserted()) is not None), None)

    def encoder_rows(self) -> EncoderRows | None:
        return next((rows for m in self._modules_in_order if (rows := m.encoder_rows()) is not None), None)

    def kept_tensors(self) -> dict[str, Tensor]:
        named = zip(self.members, self._modules_in_order, strict=True)
        return {f"{name}.{own}": t for name, module in named for own, t in module.kept_tensors().items()}

    @property
    def _modules_in_order(self) -> list[MethodModule]:
        return [m for m in self.modules_of if isinstance(m, MethodModule)]

    @classmethod
    def _rates(cls, config: Any) -> list[float]:
        return [method_class(name).default_learning_rate(getattr(config, name)) for name in cls.members]


@cache
def union_of(members: tuple[str, ...]) -> type[Union]:
    """The class of a union. Raises RecipeError for an unknown member, and for one named twice."""
    if len(set(members)) < len(members):
        raise RecipeError(f"{UNION.join(members)}: a method is named twice")
    classes = {name: method_class(name) for name in members}
    fields: dict[str, Any] = {name: (found.Config, found.Config()) for name, found in classes.items()}
    config = create_model("UnionConfig", __base__=UnionConfig, **fields)
    return type(
        "Union",
        (Union,),
        {
            "members": members,
            "Config": config,
            "summary": " and ".join(found.summary for found in classes.values()),
            "paper": ", ".join(dict.fromkeys(found.paper for found in classes.values())),
            "parts": tuple(dict.fromkeys(part for found in classes.values() for part in found.parts)),
            "acts_on_rows": all(found.acts_on_rows for found in classes.values()),
            "needs": tuple(dict.fromkeys(need for found in classes.values() for need in found.needs)),
        },
    )
