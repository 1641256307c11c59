"""Prefix-tuning (Li & Liang 2021, arXiv 2101.00190; ACL 2021 long 353).

Every layer attends over P learned slots beside its tokens (equation 3):

    h_i = P_theta[i, :]           for i in the prefix
    h_i = LM_phi(z_i, h_<i)       else, with phi frozen

so that head = softmax(q [P_k; K]^T / sqrt(d)) [P_v; V]. Slots have no query, no position of their own and
no output. Directly learned slots are unstable from random values, hence the paper's network (section 4.3,
P_theta = MLP(P'_theta)), which is folded to plain slots when kept. Started from real words (section 7.4) and
with a learning rate hundreds of times larger, directly learned slots train well, and are the default.

An encoder-decoder base gets three independent prefixes: encoder, decoder and cross-attention (the paper's code).

Axes: P slots, G key/value heads, D key width, E value width.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from antefix.base import Base
from antefix.errors import PrefixError
from antefix.methods.base import MethodConfig, MethodModule
from antefix.parts.initial import Positions, random_slots, text_slots
from antefix.parts.key_value import DirectSlots, KeyValue, NetworkSlots, Slots
from antefix.parts.site_tensors import as_kept
from antefix.sites import KINDS, Kind, Site, Sites, find_sites, sites_of_kinds
from antefix.tensor_file import TENSORS_FILE, read_tensors


class PrefixTuningConfig(MethodConfig):
    """The choices of prefix-tuning."""

    num_virtual_tokens: int | None = Field(10, ge=1, le=1_000_000)
    """Slots a site (P). None, which only Python can say: as many as `initial_text` has tokens, or the initial prefix
    has slots."""
    sites: tuple[Kind, ...] = KINDS
    """Where slots stand, of what the base has: `self`, `encoder_self`, `cross`."""
    parametrisation: Literal["direct", "network", "linear"] = "direct"
    """`network` is the paper's code (embedding - linear - tanh - linear), `linear` the paper's formula."""
    hidden_width: int = Field(512, ge=1)
    """Width of the network's hidden layer: 512 for tables, 800 for summaries in the paper."""
    embedding_width: int | None = Field(None, ge=1)
    """Width of the network's embedding; None: the base's hidden size, as in the paper's code."""
    initial: Literal["text", "normal", "uniform", "prefix"] = "text"
    """First values: of real words (exact copy; the network is fitted to it), random, or of a kept prefix."""
    initial_text: str = "Describe the following facts in a natural sentence:"
    """The words, with `initial = "text"`: best the task's own description."""
    initial_scale: float = Field(0.3, gt=0)
    """Standard deviation of `normal`, upper end of `uniform`, for direct slots."""
    initial_prefix: str | None = None
    """Folder of the kept prefix to start from; it says `initial = "prefix"`."""
    freeze_first: bool = False
    """Keep the first slot as it starts: an attention sink that training cannot move."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on keys and values while training."""
    positions: Positions = "in_place"
    """`in_place`: tokens count from 0. `shifted`: from P, as GPT-2 in the paper's code and PEFT."""

    @model_validator(mode="before")
    @classmethod
    def _a_named_prefix_is_the_start(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("initial_prefix") is not None:
            return {"initial": "prefix"} | given
        return given

    @model_validator(mode="after")
    def _no_other_start_is_named(self) -> Self:
        if self.initial_prefix is not None and self.initial != "prefix":
            raise ValueError(f"initial_prefix names the start, and initial = '{self.initial}' another: leave one out")
        return self

    @property
    def parent(self) -> str | None:
        return self.initial_prefix if self.initial == "prefix" else None

    @property
    def start_is_drawn(self) -> bool:
        return self.parametrisation != "direct" or self.initial not in ("text", "prefix")


class PrefixTuning(MethodModule):
    """One prefix. Parameters: the slots, or the embeddings and networks that make them."""

    Config: ClassVar[type[MethodConfig]] = PrefixTuningConfig
    summary = "learned keys and values at every layer (Li & Liang 2021)"
    paper = "arXiv 2101.00190"
    parts: ClassVar[tuple[str, ...]] = ("key/value slots",)
    folds_to_key_value = True
    learns_relative_to_size: ClassVar[bool] = True
    """Whether direct slots are learned as multiples of the size that they start with."""

    def __init__(self, config: PrefixTuningConfig, slots: DirectSlots | NetworkSlots, first: Slots | None) -> None:
        super().__init__()
        self.config: Any = config
        self._slots = slots
        self._frozen_names = [] if first is None else list(first)
        for index, name in enumerate(self._frozen_names):
            assert first is not None
            self.register_buffer(f"frozen_key_{index}", first[name].key_GPD[:, :1].clone())
            self.register_buffer(f"frozen_value_{index}", first[name].value_GPE[:, :1].clone())

    @classmethod
    def default_learning_rate(cls, config: PrefixTuningConfig) -> float:
        """5e-2 for direct slots, relative to their size; 5e-5 through a network (the paper: 1e-5, 5e-5 or 8e-5)."""
        return 5e-2 if config.parametrisation == "direct" else 5e-5

    @classmethod
    def build(cls, base: Base, config: PrefixTuningConfig) -> Self:
        """A fresh prefix. Raises PrefixError where the base has none of the sites, or the start does not fit."""
        sites = find_sites(base.model)
        chosen = sites_of_kinds(sites, config.sites)
        if config.positions == "shifted" and sites.positions == "none":
            raise PrefixError("positions = 'shifted' needs a base that takes position_ids: use 'in_place'")
        start = _start(base, chosen, config)
        num_slots = next(iter(start.values())).key_GPD.shape[1]
        if config.parametrisation == "direct":
            slots: DirectSlots | NetworkSlots = DirectSlots(
                chosen, start, relative=cls.learns_relative_to_size, keys_only=cls.keys_only(sites)
            )
        else:
            slots = cls.network(sites, config, num_slots)
            if config.initial in ("text", "prefix"):
                slots.fit(start)
        # Frozen values are part of what is learned around them, so they are taken from where training starts.
        first = {n: KeyValue(k.detach(), v.detach()) for n, (k, v) in slots().items()} if config.freeze_first else None
        return cls(config, slots, first)

    @classmethod
    def keys_only(cls, sites: Sites) -> Collection[str]:
        """Sites whose values come from elsewhere."""
        return ()

    @classmethod
    def network(cls, sites: Sites, config: PrefixTuningConfig, num_slots: int) -> NetworkSlots:
        """The paper's network for these sites, unfitted."""
        hidden = config.hidden_width if config.parametrisation == "network" else None
        return NetworkSlots(
            sites_of_kinds(sites, config.sites), num_slots, config.embedding_width or sites.hidden_size, hidden
        )

    @classmethod
    def restore(cls, sites: Sites, config: PrefixTuningConfig, tensors: Mapping[str, Tensor]) -> Self:
        """A kept prefix; directly parametrised, whatever it was trained with."""
        known = {s.name: s for s in sites.attention}
        slots: dict[str, KeyValue] = {}
        for name, tensor in tensors.items():
            site_name, _, part = name.rpartition(".")
            if site_name not in known or part not in ("key", "value"):
                raise PrefixError(f"tensor '{name}' belongs to no site of this base ({', '.join(known)})")
            if part == "key":
                value = tensors.get(f"{site_name}.value")
                if value is None and site_name in cls.keys_only(sites) and tensor.ndim == 3:
                    value = torch.zeros(*tensor.shape[:2], known[site_name].value_width)
                slots[site_name] = _checked(known[site_name], tensor, value)
            elif f"{site_name}.key" not in tensors:
                raise PrefixError(f"tensor '{site_name}.key' is missing beside '{name}'")
        if missing := [s.name for s in sites_of_kinds(sites, config.sites) if s.name not in slots]:
            raise PrefixError(f"the prefix has nothing for {missing[0]} of this base: load the base it was trained on")
        direct = config.model_copy(update={"parametrisation": "direct", "freeze_first": False})
        made = DirectSlots([known[n] for n in slots], slots, keys_only=cls.keys_only(sites))
        module = cls(direct, made, None)
        module.requires_grad_(False)
        return module.eval()

    @property
    def positions(self) -> Positions:
        positions: Positions = self.config.positions
        return positions

    @property
    def num_virtual_tokens(self) -> int:
        return self._slots.num_slots

    def slots(self) -> dict[str, KeyValue]:
        return self.learned_slots()

    def learned_slots(self) -> dict[str, KeyValue]:
        """Site name -> keys (G, P, D) and values (G, P, E), differentiable."""
        slots: dict[str, KeyValue] = self._slots()
        for index, name in enumerate(self._frozen_names):
            key, value = slots[name]
            slots[name] = KeyValue(
                torch.cat([self.get_buffer(f"frozen_key_{index}"), key[:, 1:]], dim=1),
                torch.cat([self.get_buffer(f"frozen_value_{index}"), value[:, 1:]], dim=1),
            )
        if self.training and self.config.dropout > 0:
            p = self.config.dropout
            slots = {n: KeyValue(torch.dropout(k, p, True), torch.dropout(v, p, True)) for n, (k, v) in slots.items()}
        return slots

    @torch.no_grad()
    def kept_tensors(self) -> dict[str, Tensor]:
        """`layers.3.self.key` and the like: the network is folded away, dropout is off."""
        was_training = self.training
        self.eval()
        tensors = {}
        for name, (key, value) in self.learned_slots().items():
            tensors[f"{name}.key"], tensors[f"{name}.value"] = as_kept(key), as_kept(value)
        self.train(was_training)
        return tensors


def _start(base: Base, sites: tuple[Site, ...], config: PrefixTuningConfig) -> Slots:
    if config.initial == "text":
        return text_slots(base, config.initial_text, config.num_virtual_tokens, config.positions)
    if config.initial == "prefix":
        return _kept_slots(sites, config)
    if config.num_virtual_tokens is None:
        raise PrefixError(f"num_virtual_tokens is needed with initial = '{config.initial}'")
    return random_slots(sites, config.num_virtual_tokens, config.initial, config.initial_scale)


def _kept_slots(sites: tuple[Site, ...], config: PrefixTuningConfig) -> Slots:
    if config.initial_prefix is None:
        raise PrefixError("initial = 'prefix' needs initial_prefix: the folder of the prefix to start from")
    tensors = read_tensors(Path(config.initial_prefix) / TENSORS_FILE)
    slots = {}
    for site in sites:
        if f"{site.name}.key" not in tensors:
            raise PrefixError(f"the initial prefix '{config.initial_prefix}' has nothing for site {site.name}")
        slots[site.name] = _checked(site, tensors[f"{site.name}.key"], tensors.get(f"{site.name}.value"))
    found = next(iter(slots.values())).key_GPD.shape[1]
    if config.num_virtual_tokens not in (None, found):
        raise PrefixError(f"the initial prefix has {found} slots, num_virtual_tokens is {config.num_virtual_tokens}")
    return slots


def _checked(site: Site, key: Tensor, value: Tensor | None) -> KeyValue:
    if value is None:
        raise PrefixError(f"tensor '{site.name}.value' is missing beside '{site.name}.key'")
    for part, tensor, width in (("key", key, site.key_width), ("value", value, site.value_width)):
        wanted = (site.num_key_value_heads, key.shape[1] if key.ndim == 3 else -1, width)
        if tuple(tensor.shape) != wanted:
            raise PrefixError(
                f"tensor '{site.name}.{part}' has shape {tuple(tensor.shape)}, this base has "
                f"{site.num_key_value_heads} key/value heads of width {width}: load the base it was trained on"
            )
    return KeyValue(key.float(), value.float())
