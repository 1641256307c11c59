"""LLaMA-Adapter (Zhang et al. 2023, arXiv 2303.16199): rows through the layer's own projections, behind a gate.

In the top layers P learned rows become keys and values by the layer's frozen projections, without rotary embedding, and
a second softmax goes over them alone:

    o = softmax(s q K^T) V + tanh(g) softmax(s q P_k^T) P_v,   g for every head

g starts at 0: the base, bit for bit. Rows start as N(0, 1). What is kept is keys, values and gates: the rows are folded
away. The released inference code multiplies by g where training has tanh(g); here it is tanh in both, and `gate =
"raw"` is what PEFT's has.

Axes: B rows, T queries, P slots, H query heads, G key/value heads, D key width, E value width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from antefix.attention.branch import Addend, Branch, Call
from antefix.attention.slot_share import share_of, slot_scores
from antefix.base import Base
from antefix.methods.base import MethodConfig, MethodModule
from antefix.parts.key_value import KeyValue
from antefix.parts.projected_rows import Projections
from antefix.parts.site_tensors import SiteTensors, as_kept, checked
from antefix.sites import Site, Sites, find_sites, sites_of_kinds

_FEW_LAYERS = 4


class LlamaAdapterConfig(MethodConfig):
    """The choices of LLaMA-Adapter."""

    num_virtual_tokens: int = Field(10, ge=1)
    """Rows a layer."""
    sites: tuple[Literal["self", "encoder_self"], ...] = ("self", "encoder_self")
    """Where it acts, of what the base has: `self`, `encoder_self`."""
    top_layers: int | None = Field(None, ge=1)
    """How many layers from the top; None: all but the lowest two, as in the paper, of more than four."""
    gate: Literal["tanh", "raw"] = "tanh"
    """What is made of the learned gate."""
    initial_gate: float = 0.0
    """First value of the gates; 0: the base exactly."""


class AdapterBranch(Branch):
    """Keys (G, P, D), values (G, P, E) and a gate for every head (H,)."""

    def __init__(self, slots: KeyValue, gate_H: Tensor) -> None:
        self._slots, self._gate_H = slots, gate_H

    def __call__(self, call: Call) -> Addend:
        share = share_of(slot_scores(call.query_BHTD, self._slots.key_GPD, call.scores), self._slots.value_GPE[None])
        return Addend(self._gate_H[:, None, None] * share.num_BHTE / share.mass_BHT[..., None])

    def tensors(self) -> Sequence[Tensor]:
        return (*self._slots, self._gate_H)


class LlamaAdapter(MethodModule):
    """One adapter: rows and gates in training, keys, values and gates once kept."""

    Config = LlamaAdapterConfig
    summary = "rows through the layer's own projections, behind a gate that starts at zero (LLaMA-Adapter, 2023)"
    paper = "arXiv 2303.16199"
    parts = ("projected rows", "gates")

    def __init__(
        self,
        config: LlamaAdapterConfig,
        sites: Sequence[Site],
        tensors: Mapping[str, Tensor],
        project: Projections | None,
    ) -> None:
        super().__init__()
        self.config, self._sites, self._project = config, list(sites), project
        self._tensors = SiteTensors(tensors)

    @classmethod
    def default_learning_rate(cls, config: LlamaAdapterConfig) -> float:
        """1.125e-3, as released (9e-3 for batches of 256, theirs are of 32)."""
        return 1.125e-3

    @classmethod
    def build(cls, base: Base, config: LlamaAdapterConfig) -> Self:
        chosen = _top(find_sites(base.model), config)
        tensors: dict[str, Tensor] = {}
        for site in chosen:
            tensors[f"{site.name}.rows"] = torch.randn(config.num_virtual_tokens, site.hidden_width)
            tensors[f"{site.name}.gate"] = torch.full((site.num_heads,), config.initial_gate)
        return cls(config, chosen, tensors, Projections(base.model, chosen))

    @classmethod
    def restore(cls, sites: Sites, config: LlamaAdapterConfig, tensors: Mapping[str, Tensor]) -> Self:
        chosen, P = _top(sites, config), config.num_virtual_tokens
        shapes: dict[str, tuple[int, ...]] = {}
        for s in chosen:
            shapes[f"{s.name}.key"] = (s.num_key_value_heads, P, s.key_width)
            shapes[f"{s.name}.value"] = (s.num_key_value_heads, P, s.value_width)
            shapes[f"{s.name}.gate"] = (s.num_heads,)
        return cls(config, chosen, checked(tensors, shapes), None).requires_grad_(False).eval()

    def branches(self) -> dict[str, Sequence[Branch]]:
        found: dict[str, Sequence[Branch]] = {}
        for site in self._sites:
            gate = self._tensors.at(site.name)["gate"]
            gate = torch.tanh(gate) if self.config.gate == "tanh" else gate
            found[site.name] = (AdapterBranch(self._slots_at(site), gate),)
        return found

    @torch.no_grad()
    def kept_tensors(self) -> dict[str, Tensor]:
        kept: dict[str, Tensor] = {}
        for site in self._sites:
            key, value = self._slots_at(site)
            gate = self._tensors.at(site.name)["gate"]
            kept |= {f"{site.name}.{n}": as_kept(t) for n, t in (("key", key), ("value", value), ("gate", gate))}
        return kept

    def _slots_at(self, site: Site) -> KeyValue:
        tensors = self._tensors.at(site.name)
        if self._project is None:
            return KeyValue(tensors["key"], tensors["value"])
        return self._project(site.name, tensors["rows"])


def _top(sites: Sites, config: LlamaAdapterConfig) -> list[Site]:
    """The sites of the highest layers of every kind."""
    chosen: list[Site] = []
    for kind in {site.kind: None for site in sites_of_kinds(sites, config.sites)}:
        of_kind = sites.of_kinds((kind,))
        count = config.top_layers or (len(of_kind) - 2 if len(of_kind) > _FEW_LAYERS else len(of_kind))
        chosen += of_kind[-count:]
    return chosen
