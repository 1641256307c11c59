"""Moves keys along the positions of a rotary base, by asking the base itself; no table of architectures.

What the model hands its attention as `position_embeddings` for a position is the rotation of that position, with
all that a config may change about it (partial rotary, scaled or per-layer frequencies); the model's own file says
how it is applied. The answer is checked on a text whose keys the model computes at both places.

Axes of a key: row, key/value head, slot, width.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from antefix.errors import BaseModelError
from antefix.hooks import while_hooked
from antefix.sites import Site, find_sites, record_text

_TEXT_TOKENS = 8
_TOLERANCE = 1e-3
_APPLY = "apply_rotary_pos_emb"


@torch.no_grad()
def moved(model: PreTrainedModel, keys: Mapping[str, Tensor], offset: int) -> dict[str, Tensor]:
    """Keys (heads, slots, width) by site name, turned as if all of them stood `offset` positions further on.

    Raises BaseModelError where the base is not rotary, or does not tell how it rotates.
    """
    sites = find_sites(model)
    if sites.positions != "relative":
        raise BaseModelError(f"{type(model).__name__} has no rotary positions")
    rotations = _rotations(model, sites.attention, offset)
    _check(model, rotations, offset)
    modules = dict(model.named_modules())
    chosen = [site for site in sites.attention if site.name in keys]
    return {s.name: _turn(modules[s.module], keys[s.name][None], rotations[s.name])[0] for s in chosen}


def _rotations(model: PreTrainedModel, sites: tuple[Site, ...], position: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Site name -> (cos, sin) of one position, as the model hands them to that site's attention."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    modules = dict(model.named_modules())

    def listener(name: str) -> Any:
        def listen(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            given = kwargs.get("position_embeddings")
            if isinstance(given, tuple) and len(given) == 2:
                cos, sin = (part[:, :1].float() for part in given)
                length = torch.hypot(cos, sin)  # some variants scale keys along with turning them
                seen[name] = cos / length, sin / length

        return listen

    handles = [modules[s.module].register_forward_pre_hook(listener(s.name), with_kwargs=True) for s in sites]
    with while_hooked(handles):
        record_text(model, torch.zeros(1, 1, dtype=torch.long, device=model.device), position)
    if missing := [site.name for site in sites if site.name not in seen]:
        raise BaseModelError(f"{type(model).__name__} does not hand {missing[0]} the rotation of a position")
    return seen


def _turn(module: nn.Module, key: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    apply = getattr(sys.modules[type(module).__module__], _APPLY, None)
    if apply is None:
        raise BaseModelError(f"the file of {type(module).__name__} has no {_APPLY}")
    cos, sin = (part.to(key.device) for part in rotation)
    _, turned = apply(key.float(), key.float(), cos, sin)
    return turned  # type: ignore[no-any-return]


def _check(model: PreTrainedModel, rotations: dict[str, tuple[Tensor, Tensor]], offset: int) -> None:
    """The keys of a text, turned, must be the keys that the model computes for the text further on."""
    ids = torch.arange(_TEXT_TOKENS, device=model.device)[None]
    here, there = record_text(model, ids, 0), record_text(model, ids, offset)
    for (site, call), (_, wanted) in zip(here, there, strict=True):
        turned = _turn(call.module, call.key, rotations[site.name])
        if not torch.allclose(turned, wanted.key.float(), rtol=0, atol=_TOLERANCE * float(call.key.abs().max())):
            raise BaseModelError(f"the keys of {type(model).__name__} at {site.name} do not turn as its file says")
