"""What methods share that put learned rows before a text: folded to slots in a causal base, rows in an encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor
from transformers import PreTrainedModel

from antefix.base import Base
from antefix.errors import PrefixError
from antefix.methods.base import MethodModule
from antefix.parts.initial import Positions
from antefix.parts.key_value import KeyValue
from antefix.parts.rows import EncoderRows, as_slots, positions_of_rows
from antefix.parts.site_tensors import SiteTensors, as_kept, checked
from antefix.sites import Sites, find_sites

ROWS = "rows"
"""The tensor of the rows themselves; `<site>.added` is what is added to them at a layer."""


class SoftRows(MethodModule):
    """Rows, and what is added to them at layers. What is kept for a causal base are the slots that they come to."""

    folds_to_key_value = True

    def __init__(self, config: Any, sites: Sites, tensors: Mapping[str, Tensor], model: PreTrainedModel | None) -> None:
        """model: the causal base that the rows are read by; None: the tensors are slots, or rows of an encoder."""
        super().__init__()
        self.config, self._sites = config, sites
        self._read_by = (model,)  # in a tuple: it is no part of this module
        self._tensors = SiteTensors(tensors)

    @classmethod
    def first_tensors(cls, base: Base, config: Any) -> dict[str, Tensor]:
        """First values of what is learned."""
        raise NotImplementedError

    @classmethod
    def encoder_shapes(cls, sites: Sites, config: Any) -> dict[str, tuple[int, ...]]:
        """Of what is kept for an encoder."""
        raise NotImplementedError

    @classmethod
    def build(cls, base: Base, config: Any) -> Self:
        sites = find_sites(base.model)
        if sites.is_causal and sites.positions == "none":
            raise PrefixError(
                "rows before a text need a base that takes position_ids, or an encoder: use prefix_tuning"
            )
        tensors = cls.first_tensors(base, config)
        return cls(config, sites, tensors, base.model if sites.is_causal else None)

    @classmethod
    def restore(cls, sites: Sites, config: Any, tensors: Mapping[str, Tensor]) -> Self:
        shapes = slot_shapes(sites, config.num_virtual_tokens) if sites.is_causal else cls.encoder_shapes(sites, config)
        return cls(config, sites, checked(tensors, shapes), None).requires_grad_(False).eval()

    @property
    def positions(self) -> Positions:
        return positions_of_rows(self._sites) if self._sites.is_causal else "in_place"

    @property
    def num_virtual_tokens(self) -> int:
        return int(self.config.num_virtual_tokens)

    def slots(self) -> dict[str, KeyValue]:
        if not self._sites.is_causal:
            return {}
        (model,) = self._read_by
        if model is not None:
            return as_slots(model, self._sites, self._rows(), self._added())
        at = {site.name: self._tensors.at(site.name) for site in self._sites.attention}
        return {name: KeyValue(tensors["key"], tensors["value"]) for name, tensors in at.items()}

    def encoder_rows(self) -> EncoderRows | None:
        return None if self._sites.is_causal else EncoderRows(self._rows(), self._added())

    def kept_tensors(self) -> dict[str, Tensor]:
        if not self._sites.is_causal:
            return self._tensors.kept()
        kept: dict[str, Tensor] = {}
        for name, (key, value) in self.slots().items():
            kept[f"{name}.key"], kept[f"{name}.value"] = as_kept(key), as_kept(value)
        return kept

    def _rows(self) -> Tensor:
        return self._tensors.named(ROWS)

    def _added(self) -> dict[str, Tensor]:
        at = {site.name: self._tensors.at(site.name) for site in self._sites.attention}
        return {name: tensors["added"] for name, tensors in at.items() if "added" in tensors}


def slot_shapes(sites: Sites, num_slots: int) -> dict[str, tuple[int, ...]]:
    """Of the slots of every site."""
    shapes: dict[str, tuple[int, ...]] = {}
    for s in sites.attention:
        shapes[f"{s.name}.key"] = (s.num_key_value_heads, num_slots, s.key_width)
        shapes[f"{s.name}.value"] = (s.num_key_value_heads, num_slots, s.value_width)
    return shapes
