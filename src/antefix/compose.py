"""New prefixes out of kept ones, without training: concatenated, truncated, averaged, subtracted.

- `concatenate`: the slots of several prefixes of one method, so that tokens attend to all of them. For methods whose
  kept tensors are plain keys and values.
- `truncate`: some slots of a prefix, the first or the last, or at every site those that got the most attention
  (`slot_attention`). For the same methods.
- `average`, `interpolate`, `subtract`: sums of equal tensors, for every method, between *relatives* alone: prefixes of
  one method, base and task, with tensors of the same names and shapes, that were made from a common parent (or one from
  the other), or started from the same values. Tensors of strangers have the same shapes and no common meaning.

Positions. Slots of an `in_place` prefix have none, tokens count from 0: such slots are joined and left out as they are.
`shifted` slots stand at 0..P-1 and tokens after them: when P changes, keys are turned so that every slot keeps the
distance to the tokens, or to its own prefix's beginning, that is said below. That takes a base whose positions are
rotary, and is refused elsewhere. What comes out names its parents and the operation in its card, and has no scores.

Axes: P slots.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from antefix.errors import BaseModelError, PrefixError, one_line
from antefix.methods import method_class
from antefix.parts.initial import Positions
from antefix.parts.label_head import LabelHead
from antefix.prefix import Card, Prefix
from antefix.rotary import moved

Kept = Mapping[str, Prefix]
"""Prefixes by the names that they have in their bank."""
_MOVES_SLOTS = ("concatenate", "truncate")
_OPERATION = "operation"
"""Where a card's training record says that a prefix was not trained, but made from others."""


def concatenate(parents: Kept, *, positions: Positions = "in_place", model: PreTrainedModel | None = None) -> Prefix:
    """The slots of all, in this order; the text format and the task are the first one's.

    positions: `in_place`: tokens count from 0, and every slot keeps its distance to them. `shifted`: the prefixes stand
    one after the other and tokens after the last, as if their texts followed each other: every slot of the last one
    keeps its distance to the tokens. model: their base's, needed where keys are turned (anything but `in_place`
    prefixes put `in_place`). Raises PrefixError for prefixes that this is not defined for, naming which and why, and
    for a model that is not their base (WrongBaseError).
    """
    names, prefixes = list(parents), list(parents.values())
    if len(prefixes) < 2:
        raise PrefixError("concatenate takes two prefixes or more")
    _check_same(parents, ("method", "base"), "concatenated")
    counts = [_num_slots(name, prefix, "concatenated") for name, prefix in parents.items()]
    for name, prefix in parents.items():
        if prefix.card.task != prefixes[0].card.task:
            raise PrefixError(
                f"'{name}' has another task than '{names[0]}': only prefixes of one task are concatenated"
            )
        if prefix.tensors.keys() != prefixes[0].tensors.keys():
            raise PrefixError(f"'{name}' has slots at other sites than '{names[0]}': they cannot be concatenated")
    _check_takes(prefixes[0].card, positions)
    parts = []
    for n, (prefix, count) in enumerate(zip(prefixes, counts, strict=True)):
        # Where its first slot stands, as seen from the tokens' beginning in place, or from the first prefix's.
        now = -count if prefix.card.positions == "in_place" else 0
        if positions == "in_place":
            offset = 0 if prefix.card.positions == "in_place" else -count
        else:
            offset = sum(counts[:n]) - now
        parts.append(_turned(prefix, offset, model))
    tensors = {name: torch.cat([part[name] for part in parts], dim=1).contiguous() for name in parts[0]}
    card = _card(parents, "concatenate", {"positions": positions}, sum(counts), positions)
    return Prefix(tensors, card)


def truncate(
    parents: Kept,
    num_slots: int,
    *,
    keep: Literal["first", "last", "attention"] = "first",
    attention: Mapping[str, Tensor] | None = None,
    model: PreTrainedModel | None = None,
) -> Prefix:
    """So many slots of one prefix, in the order that they have; each keeps its distance to the tokens.

    keep: `attention`: at every site those with the most; `attention` then holds it, (P,) by site (`slot_attention`).
    model: the base's, needed for `shifted` prefixes. Raises PrefixError as `concatenate` does.
    """
    if len(parents) != 1:
        raise PrefixError("truncate takes one prefix")
    ((name, prefix),) = parents.items()
    count = _num_slots(name, prefix, "truncated")
    if not 1 <= num_slots < count:
        raise PrefixError(f"'{name}' has {count} slots: keep at least 1 and at most {count - 1} of them")
    shifted = prefix.card.positions == "shifted"
    # Tokens begin `count - num_slots` earlier: so do the slots that stay.
    tensors = _turned(prefix, num_slots - count if shifted else 0, model)
    kept: dict[str, Tensor] = {}
    for tensor_name, tensor in tensors.items():
        if keep == "attention":
            weights = (attention or {}).get(tensor_name.rpartition(".")[0])
            if weights is None or weights.shape != (count,):
                raise PrefixError(f"the attention of '{name}' is not known at {tensor_name}: measure it first")
            chosen = weights.topk(num_slots).indices.sort().values
        else:
            chosen = torch.arange(num_slots) + (count - num_slots if keep == "last" else 0)
        kept[tensor_name] = tensor[:, chosen].contiguous()
    return Prefix(kept, _card(parents, "truncate", {"keep": keep, "of": count}, num_slots, prefix.card.positions))


def average(parents: Kept, weights: Sequence[float] | None = None) -> Prefix:
    """The weighted mean of relatives, by default the plain one. Raises PrefixError for others, and for such weights."""
    if len(parents) < 2:
        raise PrefixError("average takes two prefixes or more")
    shares = [1.0] * len(parents) if weights is None else list(weights)
    if len(shares) != len(parents):
        raise PrefixError(f"{len(shares)} weights for {len(parents)} prefixes: give one for each")
    total = sum(shares)
    if not (min(shares) >= 0 and 0 < total < float("inf")):
        raise PrefixError(f"weights {', '.join(map(str, shares))}: give numbers from 0, not all of them 0")
    return _summed(parents, [s / total for s in shares], "average")


def interpolate(parents: Kept, share: float) -> Prefix:
    """Between two relatives: `(1 - share)` of the first and `share` of the second; beyond 0 and 1 it goes on.

    Raises PrefixError for others.
    """
    if len(parents) != 2:
        raise PrefixError("interpolate takes two prefixes")
    return _summed(parents, [1.0 - share, share], "interpolate")


def subtract(parents: Kept, weight: float = 1.0) -> Prefix:
    """Of three relatives `first - weight * (second - start)`: the first without what the second learned.

    The third is what the second started from (its parent). Raises PrefixError for others.
    """
    if len(parents) != 3:
        raise PrefixError("subtract takes three prefixes: from which, which, and what the latter started from")
    _, second, start = parents
    if start not in parents[second].card.parents:
        raise PrefixError(f"'{second}' was not made from '{start}': what it learned since then is not known")
    return _summed(parents, [1.0, -weight, weight], "subtract")


def check_relatives(parents: Kept) -> None:
    """Raises PrefixError, naming two of them and why, unless all are relatives of the first."""
    _check_same(parents, ("method", "base", "positions", "task"), "mixed")
    (first, one), *others = parents.items()
    for name, other in others:
        shapes, wanted = ({n: tuple(t.shape) for n, t in p.tensors.items()} for p in (other, one))
        if differing := sorted(n for n in shapes.keys() | wanted.keys() if shapes.get(n) != wanted.get(n)):
            found = f"{shapes.get(differing[0])} in one and {wanted.get(differing[0])} in the other"
            raise PrefixError(f"'{name}' and '{first}' are no relatives: tensor '{differing[0]}' is {found}")
        share_a_parent = {first, *one.card.parents} & {name, *other.card.parents}
        if not ((share_a_parent and _slots_are_alike(first, one, name, other)) or _start_alike(one, other)):
            raise PrefixError(
                f"'{name}' and '{first}' are no relatives: neither do they have a parent in common, nor did they start "
                "from the same values; train both from one prefix (config.initial_prefix), or with one config and seed"
            )


def _summed(parents: Kept, weights: Sequence[float], operation: str) -> Prefix:
    check_relatives(parents)
    prefixes = list(parents.values())
    if not all(map(math.isfinite, weights)):
        raise PrefixError(f"weights {', '.join(map(str, weights))}: give finite numbers")
    tensors = {
        name: sum((w * p.tensors[name].float() for w, p in zip(weights, prefixes, strict=True)), torch.zeros(())).to(
            tensor.dtype
        )
        for name, tensor in prefixes[0].tensors.items()
    }
    if beyond := next((name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())), None):
        raise PrefixError(f"weights {', '.join(map(str, weights))}: '{beyond}' has no room for what they come to")
    return Prefix(tensors, _card(parents, operation, {"weights": list(weights)}))


def _slots_are_alike(first: str, one: Prefix, name: str, other: Prefix) -> bool:
    """Whether the same slots stand at the same places in two that have a parent in common, or are parent and child."""
    records = [p.card.training for p in (one, other)]
    was_moved, other_was_moved = (r.get(_OPERATION) in _MOVES_SLOTS for r in records)
    if first in other.card.parents and not other_was_moved:
        return True
    if name in one.card.parents and not was_moved:
        return True
    if not (was_moved or other_was_moved):
        return True
    return records[0] == records[1] and one.card.parents == other.card.parents and records[0].get("keep") != "attention"


def _start_alike(one: Prefix, other: Prefix) -> bool:
    """Whether training began at the same tensors: the same config, and the same seed where something is drawn."""
    records = [p.card.training for p in (one, other)]
    if one.card.config != other.card.config or any(not r or _OPERATION in r for r in records):
        return False
    config = method_class(one.card.method).Config.model_validate(one.card.config)
    is_drawn = config.start_is_drawn or any(name in one.tensors for name in LabelHead.NAMES)
    seeds = [r.get("seed") for r in records]
    return not is_drawn or (None not in seeds and seeds[0] == seeds[1])


def _check_same(parents: Kept, fields: Sequence[Literal["method", "base", "positions", "task"]], done: str) -> None:
    for (first, one), (name, other) in pairwise(parents.items()):
        for field in fields:
            values = [_told(p.card, field) for p in (one, other)]
            if values[0] != values[1]:
                raise PrefixError(
                    f"'{first}' and '{name}' cannot be {done}: {field} is {one_line(values[0], 60)} in one and "
                    f"{one_line(values[1], 60)} in the other"
                )


def _told(card: Card, field: Literal["method", "base", "positions", "task"]) -> object:
    if field == "base":
        return card.base.fingerprint
    if field == "task" and card.task.writes_text:
        return "to write texts"
    return getattr(card, field)


def _num_slots(name: str, prefix: Prefix, done: str) -> int:
    """How many slots it has at every site. Raises PrefixError where it is anything but plain keys and values."""
    method = prefix.card.method
    if not method_class(method).folds_to_key_value:
        raise PrefixError(f"'{name}' cannot be {done}: {method} is not kept as plain keys and values")
    parts = {tensor.rpartition(".")[2] for tensor in prefix.tensors}
    if parts != {"key", "value"} or any(t.ndim != 3 for t in prefix.tensors.values()):
        other = next((n for n in sorted(prefix.tensors) if n.rpartition(".")[2] not in ("key", "value")), "a shape")
        raise PrefixError(f"'{name}' cannot be {done}: it has '{other}' beside keys and values of slots")
    counts = {t.shape[1] for t in prefix.tensors.values()}
    if len(counts) > 1:
        raise PrefixError(
            f"'{name}' cannot be {done}: it has {min(counts)} slots at one site, {max(counts)} at another"
        )
    return counts.pop()


def _check_takes(card: Card, positions: Positions) -> None:
    """A method that cannot be told where tokens stand has them where the base's kind of positions puts them."""
    if positions != card.config.get("positions", card.positions) and not _may_be(card, positions):
        raise PrefixError(f"{card.method} cannot be {positions}: its prefixes are {card.positions}")


def _may_be(card: Card, positions: Positions) -> bool:
    found = method_class(card.method).Config
    if "positions" not in found.model_fields:
        return False
    try:
        found.model_validate({**card.config, "positions": positions})
    except ValueError:  # of infix, for one
        return False
    return True


def _turned(prefix: Prefix, offset: int, model: PreTrainedModel | None) -> dict[str, Tensor]:
    """Its tensors, the keys as if they stood so many positions further on."""
    if offset == 0:
        return dict(prefix.tensors)
    if model is None:
        raise PrefixError("slots change their places here, which turns their keys: give their base's model")
    prefix.module(model)  # refuses another base
    keys = {n.removesuffix(".key"): t.float().to(model.device) for n, t in prefix.tensors.items() if n.endswith(".key")}
    try:
        turned = moved(model, keys, offset)
    except BaseModelError as error:
        raise PrefixError(f"slots cannot change their places on this base: {error}") from error
    back = {f"{n}.key": k.to(device="cpu", dtype=prefix.tensors[f"{n}.key"].dtype) for n, k in turned.items()}
    return {**prefix.tensors, **back}


def _card(
    parents: Kept, operation: str, how: dict[str, Any], num_slots: int | None = None, positions: Positions | None = None
) -> Card:
    """The first one's, with what is another now."""
    first = next(iter(parents.values())).card
    config = dict(first.config)
    if num_slots is not None:
        config["num_virtual_tokens"] = num_slots
    if positions is not None and "positions" in method_class(first.method).Config.model_fields:
        config["positions"] = positions
    return first.model_copy(
        update={
            "config": config, "positions": positions or first.positions, "parents": tuple(parents), "scores": {},
            "training": {_OPERATION: operation, **how}, "notes": "",
            "tags": tuple(dict.fromkeys(tag for p in parents.values() for tag in p.card.tags)),
            "licence": _licence(parents),
        }
    )  # fmt: skip


def _licence(parents: Kept) -> str | None:
    """All that bind it."""
    return ", ".join(dict.fromkeys(p.card.licence for p in parents.values() if p.card.licence)) or None
